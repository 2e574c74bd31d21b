"""Time models of calls that the dispatcher does not see through: plain, planned, and with every block checkpointed.

    python -m benchmarks.opaque_blocks [MODEL ...] [--rounds N] [--output FILE.md]

Llama blocks as Liger, flash_attn and `torch.compile` make them, in two sizes, and ELECTRA at a size whose step takes
milliseconds.  Two plans are timed: at the peak that `torch.utils.checkpoint(use_reentrant=False)` on every block has,
and half way from there to the plain peak.  Steps are interleaved; times are medians, of one thread's processor time and
of the clock on the wall.  Every step's gradients are compared with the plain step's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tightfit
from benchmarks.kept_memory import keep_memory
from benchmarks.llama import Llama, LlamaSizes, Parts
from tests.support.fused_kernels import FusedAttention, FusedGate, FusedNorm
from tightfit.device import device_for
from tightfit.device.memory import resident_bytes
from tightfit.step.model import give_gradients

MIB = 2**20
#: A step of milliseconds, where Python counts, and one where the operations do.
SMALL = LlamaSizes(hidden=64, heads=4, kv_heads=4, intermediate=176, layers=4, vocabulary=256)
LARGE = LlamaSizes(hidden=256, heads=4, kv_heads=4, intermediate=704, layers=4, vocabulary=256)
#: Batch and tokens.
SHAPES = {SMALL: (2, 64), LARGE: (4, 256)}
WARM_UP = 3


class FusedRmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return FusedNorm.apply(x, self.weight, 1e-5)  # type: ignore[no-any-return,no-untyped-call]  # PyTorch's is not annotated


def rotate_and_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return FusedAttention.apply(query, key, value, None, True)  # type: ignore[no-any-return,no-untyped-call]  # PyTorch's is not annotated


def compiled_gate() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(lambda gate, up: F.silu(gate) * up)  # type: ignore[no-any-return]  # what it returns is a tensor


def parts() -> dict[str, Parts]:
    return {
        "eager": Parts(),
        "liger": Parts(norm=FusedRmsNorm, gate=FusedGate.apply),  # type: ignore[arg-type]  # PyTorch's is not annotated
        "flash_attn": Parts(attention=rotate_and_attend),
        "compiled": Parts(gate=compiled_gate()),
    }


def checkpoint_every(blocks: nn.ModuleList) -> None:
    """Wrap the blocks' calls, as a model does that checkpoints itself."""
    for block in blocks:
        block.forward = lambda *args, on=block.forward, **kwargs: checkpoint(on, *args, use_reentrant=False, **kwargs)  # type: ignore[method-assign]  # an instance's


@dataclass
class Case:
    """A model's way to train."""

    name: str
    make: Callable[[], nn.Module]
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]
    blocks: Callable[[Any], nn.ModuleList]


def llama_case(kind: str, sizes: LlamaSizes, given: Parts) -> Case:
    batch, tokens = SHAPES[sizes]
    return Case(
        name=f"{kind}{'' if sizes is SMALL else '-large'}",
        make=lambda: Llama(sizes, given),
        batch=torch.randint(0, sizes.vocabulary, (batch, tokens + 1)),
        loss=lambda model, ids: model(ids),
        blocks=lambda model: model.layers,
    )


def electra_case() -> Case:
    from transformers import ElectraConfig, ElectraForMaskedLM

    config = ElectraConfig(
        vocab_size=99, embedding_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=37, max_position_embeddings=64,
    )  # fmt: skip
    return Case(
        name="electra",
        make=lambda: ElectraForMaskedLM(config),
        batch=torch.randint(0, 99, (13, 7)),
        loss=lambda model, ids: model(input_ids=ids, labels=ids).loss,
        blocks=lambda model: model.electra.encoder.layer,
    )


def cases() -> dict[str, Callable[[], Case]]:
    found: dict[str, Callable[[], Case]] = {"electra": electra_case}
    for kind, given in parts().items():
        for sizes in (SMALL, LARGE):
            case = llama_case(kind, sizes, given)
            found[case.name] = lambda case=case: case
    return found


@dataclass
class Timed:
    """One way to run the step, with what it took."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    peak_bytes: int = 0
    note: str = ""
    cpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def run(self, batch: Any) -> None:
        """One step: forward and backward."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        torch.manual_seed(0)
        wall, cpu = time.perf_counter(), time.process_time()
        self.loss(self.model, batch).backward()
        self.cpu_ms.append((time.process_time() - cpu) * 1e3)
        self.wall_ms.append((time.perf_counter() - wall) * 1e3)
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def fresh(case: Case, *, checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = case.make().train()
    if checkpointed:
        checkpoint_every(case.blocks(model))
    give_gradients(model)
    return model


def peak_of(model: nn.Module, case: Case) -> int:
    """The measured peak of a step, once compilers are through."""
    case.loss(model, case.batch).backward()
    step = device_for(model).measure_peak
    return step(lambda: case.loss(model, case.batch).backward(), resident_bytes(model, case.batch, ()))[1]


def planned(case: Case, budget: int) -> Timed:
    """The step under a plan; `note` tells by what executors, and of a budget that does not fit."""
    model = fresh(case)
    note = ""
    try:
        applied = tightfit.fit(model, case.batch, budget=budget, loss=case.loss)
    except tightfit.BudgetInfeasible as error:
        note = f"smallest {error.required_bytes / MIB:.2f} MiB; "
        applied = tightfit.fit(model, case.batch, budget=error.required_bytes, loss=case.loss)
    recipes = applied.plan.recipes
    executors = [recipes[region.recipe].executor for region in applied.plan.regions if region.recipe >= 0]
    counts = {name: executors.count(name) for name in sorted(set(executors))}
    note += f"{counts}, predicted {applied.plan.overhead_ratio:.3f}"
    verdict = applied.verdict
    assert verdict is not None
    return Timed(model, applied.loss, verdict.measured_peak_bytes or 0, note)


def measure(case: Case, rounds: int) -> dict[str, Timed]:
    """Run the step in every way, in turn."""
    plain, every = fresh(case), fresh(case, checkpointed=True)
    plain_bytes, every_bytes = peak_of(plain, case), peak_of(every, case)
    ways = {
        "plain": Timed(plain, case.loss, plain_bytes),
        "checkpoint": Timed(every, case.loss, every_bytes),
        "at checkpoint's": planned(case, every_bytes),
        "half way": planned(case, (every_bytes + plain_bytes) // 2),
    }
    for number in range(WARM_UP + rounds):
        order = list(ways.values())
        for way in order[number % len(order) :] + order[: number % len(order)]:
            way.run(case.batch)
            if number < WARM_UP:
                way.cpu_ms.clear()
                way.wall_ms.clear()
    return ways


def lines_of(case: Case, ways: dict[str, Timed]) -> list[str]:
    """The table of one model."""
    plain, every = ways["plain"], ways["checkpoint"]
    lines = [
        f"## {case.name}: plain {statistics.median(plain.wall_ms):.2f} ms",
        "",
        "| way | peak MiB | CPU ms | over plain | over checkpoint | added, of checkpoint's | wall | bits | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        cpu, wall = statistics.median(way.cpu_ms), statistics.median(way.wall_ms)
        plain_ms, every_ms = statistics.median(plain.cpu_ms), statistics.median(every.cpu_ms)
        equal = all(map(torch.equal, plain.gradients, way.gradients))
        lines.append(
            f"| {name} | {way.peak_bytes / MIB:.3f} | {cpu:.2f} | {cpu / plain_ms:.3f} | {cpu / every_ms:.3f} | "
            f"{(cpu - plain_ms) / (every_ms - plain_ms):.2f} | {wall / statistics.median(every.wall_ms):.3f} | "
            f"{'equal' if equal else 'DIFFER'} | {way.note} |"
        )
    return [*lines, ""]


def main() -> None:
    """Print the tables, and write them where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of models; all of them by default")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = cases()
    text = [
        "# Calls that the dispatcher does not see through",
        "",
        f"PyTorch {torch.__version__}, 1 thread, medians of {options.rounds} interleaved steps; "
        "`python -m benchmarks.opaque_blocks`.",
        "",
    ]
    print("\n".join(text), flush=True)
    for name in options.models or found:
        case = found[name]()
        lines = lines_of(case, measure(case, options.rounds))
        print("\n".join(lines), flush=True)
        text += lines
    if options.output is not None:
        options.output.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    keep_memory("benchmarks.opaque_blocks")
    main()
