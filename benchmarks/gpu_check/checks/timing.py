"""What operations and steps take: alone and in a step, of the GPU and of Python, as predicted and as measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import tightfit
from benchmarks import tape_overhead
from benchmarks.gpu_check.models import adamw, small
from benchmarks.gpu_check.registry import Report, check
from benchmarks.llama import LLAMA_8B, Block, LlamaSizes, rotary
from tests.emulated_cuda.counters import is_active
from tightfit._torch_private.dispatch import DispatchMode, below_autograd, tree_leaves
from tightfit.solver.solver import Solver

_REPEATS = 10
_MOST_OPERATIONS = 60
#: More than any GPU's second-level cache.
_FLUSHED_BYTES = 2**28


class _Timing(DispatchMode):
    """Run each distinct operation of a step again and again where it comes up, with its own arguments.

    Only what writes none of its arguments; random operations leave the generator elsewhere, which is of no matter here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, dict[str, Any]] = {}
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = f"{func} {_shapes((*args, *kwargs.values()))}"
        if name in self.rows:
            self.rows[name]["calls"] += 1
        elif not func._schema.is_mutable and not func.is_view and len(self.rows) < _MOST_OPERATIONS:
            self.rows[name] = {"operation": name, "calls": 1, **self._times_ms(lambda: func(*args, **kwargs))}
        return func(*args, **kwargs)

    def _times_ms(self, run: Callable[[], object]) -> dict[str, float]:
        with below_autograd():
            run()
            wall, host, device = [], [], []
            for _ in range(_REPEATS):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                run()
                torch.cuda.synchronize()
                wall.append((time.perf_counter() - begin) * 1e3)
            torch.cuda.synchronize()
            for _ in range(_REPEATS):
                begin = time.perf_counter()
                run()
                host.append((time.perf_counter() - begin) * 1e3)
            events = []
            for _ in range(_REPEATS):
                self._flushed.zero_()  # 0.1 ms or so, in which the launches that follow get ahead of the GPU
                first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                second.record()
                events.append((first, second))
            torch.cuda.synchronize()
            device = [first.elapsed_time(second) for first, second in events]
        return {"wall_ms": min(wall), "host_ms": min(host), "device_ms": statistics.median(device)}


def _shapes(arguments: Any) -> str:
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    return " ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors)


@check("operation-times", place=10, seconds=75, shows="each operation alone by clock and by events, and in a step")
def operation_times(report: Report) -> None:
    """Time the operations of a Llama block and of a small residual network."""
    for name, make in (("a Llama block", _llama_block), ("resnet", _resnet)):
        forward = make()
        forward().backward()
        with _Timing() as timing:
            forward().backward()
        in_step_ms, step_ms = _profiled(forward)
        rows = sorted(timing.rows.values(), key=lambda row: -row["calls"] * row["wall_ms"])
        for row in rows:
            report.note(f"{name}: operation", **row)
        sums = {key: sum(row["calls"] * row[key] for row in rows) for key in ("wall_ms", "host_ms", "device_ms")}
        report.note(f"{name}: sums", operations=len(rows), kernels_in_step_ms=in_step_ms, step_ms=step_ms, **sums)
        report.claim(f"{name}: sums", "operations were timed", bool(rows))


def _llama_block() -> Callable[[], torch.Tensor]:
    sizes = LlamaSizes(hidden=512, heads=8, kv_heads=2, intermediate=1408) if is_active() else LLAMA_8B
    torch.manual_seed(0)
    block = Block(sizes).to("cuda", torch.bfloat16)
    x = torch.randn(1, 4096, sizes.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cosine, sine = rotary(x.shape[1], sizes.hidden // sizes.heads, x)
    return lambda: block(x, cosine, sine).float().sum()


def _resnet() -> Callable[[], torch.Tensor]:
    model, batch, loss = small("resnet")
    return lambda: loss(model, batch)


def _profiled(forward: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Return the time of all kernels in a step by the profiler, and the step's own by the clock."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        forward().backward()
        torch.cuda.synchronize()
    kernels_ms = sum(event.self_device_time_total for event in profile.key_averages()) / 1e3
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        forward().backward()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return kernels_ms, statistics.median(times)


@check("step-times", place=11, seconds=60, shows="predicted and measured times of plain and planned steps")
def step_times(report: Report) -> None:
    """Solve for three budgets and time steps under each plan."""
    for name in ("gpt", "resnet"):
        model, batch, loss = small(name)
        step = adamw(model, loss)
        profile = tightfit.measure(model, batch, step=step)
        solver = Solver(profile)
        smallest, plain = solver.smallest().peak_bytes, solver.plain(0).predicted_peak_bytes
        report.note(
            f"{name}: mechanism",
            mode_ms_per_op=profile.mode_ms_per_op,
            tape_ms_per_op=profile.tape_ms_per_op,
            module_ms_per_op=profile.module_ms_per_op,
            module_ms_per_call=profile.module_ms_per_call,
            measuring_ms=profile.measuring_ms,
        )
        for share in (1.0, 0.66, 0.33, 0.0):
            plan = solver.solve(int(smallest + share * (plain - smallest)))
            with tightfit.apply(model, plan, step=step) as applied:
                counts, times = applied.statistics, []
                for _ in range(8):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    applied.loss(model, batch).backward()
                    step.run_optimizers(model)
                    torch.cuda.synchronize()
                    times.append((time.perf_counter() - begin) * 1e3)
            case = f"{name}: {share:.0%} kept"
            report.note(
                case, predicted_ms=plan.predicted_step_ms, predicted_plain_ms=plan.plain_step_ms,
                step_ms=statistics.median(times[2:]), replayed=counts.replayed_ops,
            )  # fmt: skip
            report.claim(
                case, "steps run as planned", not counts.mismatches and bool(counts.replayed_ops) == (share < 1)
            )


@check("tape-overhead", place=12, seconds=60, shows="what the tape costs on one Llama block, beside checkpointing")
def mechanism(report: Report) -> None:
    """Run `benchmarks/tape_overhead.py`'s variants at three sizes."""
    sizes = tape_overhead.CPU_SIZES if is_active() else tape_overhead.CUDA_SIZES
    for title, size in sizes.items():
        found = tape_overhead.run(*size)
        for variant, ms in found["wall"].items():
            report.note(
                title, variant=variant, step_ms=ms, submitted_ms=found["host"][variant],
                operations=found["ops"], equal=found["equal"][variant],
            )  # fmt: skip
        report.claim(title, "all that can be is replayed when all is dropped", found["replayed"] > 0)
