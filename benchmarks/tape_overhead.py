"""What the tape costs, on one Llama block: plain, an empty dispatch mode, hooks only, the tape, plain checkpoint.

    python -m benchmarks.tape_overhead [--output FILE.md]

On CUDA: bf16 at realistic sizes; on a machine without a GPU: fp32 and small blocks.  Forward and backward of one block,
medians of interleaved rounds in one process: wall time until the device is done, and until Python has submitted all.
"nothing recorded": a planned region that has no use for its operations, what each operation pays that a plan neither
drops nor replays.  "all recorded" writes every operation down and drops nothing: the mechanism alone.  "all dropped"
also replays.  "selective checkpoint" is PyTorch's, keeping the results of matrix products and attention.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.llama import Block, LlamaSizes, rotary
from tightfit.profiling.measure import measure_step
from tightfit.records import Recipe
from tightfit.replay.installed import Installed
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.step.step import Step

# name: hidden, heads, key-value heads, intermediate, batch, tokens
CUDA_SIZES = {
    "Llama-3-8B block, 4096 tokens": (4096, 32, 8, 14336, 1, 4096),
    "Llama-3-8B block, 1024 tokens": (4096, 32, 8, 14336, 1, 1024),
    "small block (launch-bound), 256 tokens": (512, 8, 8, 1408, 1, 256),
}
CPU_SIZES = {
    "Llama block, hidden 256, 8x256 tokens": (256, 4, 4, 704, 8, 256),
    "tiny block (nothing but overhead), 8 tokens": (32, 4, 4, 64, 1, 8),
}
ROUNDS = 30


def keep_expensive(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Of selective checkpointing: the results of these are kept."""
    expensive = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten._scaled_dot_product_", "aten._flash_attention")
    return CheckpointPolicy.MUST_SAVE if str(op).startswith(expensive) else CheckpointPolicy.PREFER_RECOMPUTE


def selective() -> Any:
    return create_selective_checkpoint_contexts(keep_expensive)


class EmptyMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class OneBlock(torch.nn.Module):
    """One decoder layer of Llama with its rotary positions."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, intermediate: int) -> None:
        super().__init__()
        self.layer = Block(LlamaSizes(hidden=hidden, heads=heads, kv_heads=kv_heads, intermediate=intermediate))
        self._rotary_width = hidden // heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, *rotary(x.shape[1], self._rotary_width, x))


def recipes(block: OneBlock, x: torch.Tensor) -> tuple[dict[str, Installed], int]:
    """Installed sessions that record nothing, record all and drop all, and the number of operations."""
    profile = measure_step(block, x, Step(loss=lambda m, b: m(b).float().sum()))
    index = ProfileIndex(profile)
    nothing: dict[str, ResolvedRecipe | None] = {}
    recorded: dict[str, ResolvedRecipe | None] = {}
    everything: dict[str, ResolvedRecipe | None] = {}
    ops = 0
    for number, region in enumerate(profile.regions):
        if region.key.startswith("<loss>") or not region.op_count:
            nothing[region.key] = recorded[region.key] = everything[region.key] = None
            continue
        ops += region.op_count
        names = tuple(
            profile.signatures[op.signature].name
            for op in profile.ops[region.first_op : region.first_op + region.op_count]
        )
        needed = index.needed_ops(number, frozenset())
        drop = tuple(sorted({index.local(profile.slots[slot].value) for slot in index.facts[number].slots}))
        common = {"class_id": 0, "op_names": names, "lever": "tape", "executor": "tape", "keep": ()}
        common |= {"held_bytes": 0, "dropped_bytes": 0, "replay_ms": 0.0}
        nothing[region.key] = ResolvedRecipe(Recipe(**common, drop=(), replay=()))
        recorded[region.key] = ResolvedRecipe(Recipe(**common, drop=(), replay=tuple(range(region.op_count))))
        replay = tuple(sorted(op - region.first_op for op in needed))
        everything[region.key] = ResolvedRecipe(Recipe(**common, drop=drop, replay=replay))
    planned = {"nothing recorded": nothing, "all recorded": recorded, "all dropped": everything}
    return {name: Installed(recipes=found, self_check=False) for name, found in planned.items()}, ops


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(hidden: int, heads: int, kv_heads: int, intermediate: int, batch: int, tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = OneBlock(hidden, heads, kv_heads, intermediate).to(device, dtype)
    x = torch.randn(batch, tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    planned, ops = recipes(block, x)

    @contextmanager
    def hooks_only() -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            yield

    @contextmanager
    def taped(installed: Installed) -> Iterator[None]:
        with installed.region("<model>"):
            yield

    def forward_in(context: Callable[[], Any]) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            with context():
                return block(x)

        return forward

    variants: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: block(x),
        "empty dispatch mode": forward_in(EmptyMode),
        "hooks only": forward_in(hooks_only),
        **{name: forward_in(lambda found=found: taped(found)) for name, found in planned.items()},
        "torch checkpoint": lambda: checkpoint(block, x, use_reentrant=False),
        "selective checkpoint": lambda: checkpoint(block, x, use_reentrant=False, context_fn=selective),
    }
    wall_ms: dict[str, list[float]] = {name: [] for name in variants}
    host_ms: dict[str, list[float]] = {name: [] for name in variants}
    gradients: dict[str, list[torch.Tensor]] = {}
    for round_number in range(ROUNDS + 3):
        for name, forward in variants.items():
            block.zero_grad(set_to_none=True)
            x.grad = None
            synchronize()
            clock = time.perf_counter()
            forward().sum().backward()
            submitted = (time.perf_counter() - clock) * 1e3
            synchronize()
            done = (time.perf_counter() - clock) * 1e3
            if round_number == 0:
                gradients[name] = [p.grad.clone() for p in block.parameters() if p.grad is not None] + [x.grad.clone()]
            if round_number >= 3:
                wall_ms[name].append(done)
                host_ms[name].append(submitted)
    plain = gradients["plain"]
    return {
        "ops": ops,
        "replayed": planned["all dropped"].statistics.replayed_ops // (ROUNDS + 3),
        "wall": {name: statistics.median(times) for name, times in wall_ms.items()},
        "host": {name: statistics.median(times) for name, times in host_ms.items()},
        "equal": {
            name: all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)) for name, found in gradients.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="also write the tables to this file")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    sizes = CUDA_SIZES if cuda else CPU_SIZES
    hardware = f"{torch.cuda.get_device_name()}, bf16" if cuda else f"CPU, {torch.get_num_threads()} threads, fp32"
    lines = [
        "# The tape's cost on one Llama block, forward + backward",
        "",
        f"{hardware}, PyTorch {torch.__version__}; medians of {ROUNDS} interleaved rounds; "
        "`python -m benchmarks.tape_overhead`.",
    ]
    for title, size in sizes.items():
        found = run(*size)
        plain_ms, plain_host_ms = found["wall"]["plain"], found["host"]["plain"]
        lines += [
            "",
            f"## {title} ({found['ops']} taped operations, {found['replayed']} replayed when all is dropped)",
            "",
            "| variant | step ms | over plain | ms to submit | µs per operation over plain | gradients equal |",
            "|---|---|---|---|---|---|",
        ]
        for name, ms in found["wall"].items():
            extra_us = (found["host"][name] - plain_host_ms) / found["ops"] * 1e3
            lines.append(
                f"| {name} | {ms:.3f} | {100 * (ms / plain_ms - 1):+.1f} % | {found['host'][name]:.3f} | "
                f"{extra_us:+.1f} | {'yes' if found['equal'][name] else 'no'} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
