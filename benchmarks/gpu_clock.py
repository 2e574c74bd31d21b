"""Predicted and emulated step times at several ratios of the kernels' time to Python's, on the emulated CUDA's clock.

    python -m tests.emulated_cuda.run python -m benchmarks.gpu_clock [--output FILE.md] [--processor]

Needs no GPU (docs/emulated-cuda.md).  A ratio is that of the plain step's kernels to the host's time of the step in
which all that can be is dropped and written to tapes.  The host's time is counted: so much for each launch and for each
function that Python calls; with ``--processor`` it is the processor's time, which differs from run to run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

import tightfit
from tests.emulated_cuda import clock, counters
from tightfit.records import Plan, Profile
from tightfit.solver.solver import Solver, full_plan
from tightfit.step.step import Step

RATIOS = (0.2, 1.0, 5.0)
#: Copies and large kernels take long enough for the host to get ahead.
COUNTED = clock.Costs(launch_us=20.0, call_us=0.5, kernel_ps_per_thread=8.0)
PROCESSOR = clock.Costs(of_processor=True, kernel_ps_per_thread=100.0)
#: Calls of libraries (matrix products) take so many times as long as other kernels.
HEAVY = 6.0


class Block(nn.Module):
    """Products of matrices, and small kernels between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.norm(x))
        return x + self.down(y * y.sigmoid().tanh())


@dataclass(frozen=True)
class Row:
    """One plan at one ratio: what was said, and what the clock said."""

    ratio: float
    plan: str
    predicted_ms: float
    ms: float
    plain_ms: float
    tape_ms: float
    """What dropping everything adds to the host's time where kernels take none."""
    kernels_ms: float = 0.0
    """Of the operations that run again."""
    products: int = 0
    """Matrix products among them."""
    again: tuple[int, ...] = ()
    """Those operations."""

    @property
    def error(self) -> float:
        """How far off the prediction is, in parts of what was emulated."""
        return self.predicted_ms / self.ms - 1

    @property
    def added_ms(self) -> float:
        """What the plan adds to the step."""
        return self.ms - self.plain_ms


@dataclass(frozen=True)
class Training:
    """What is run."""

    model: nn.Module
    batch: torch.Tensor
    step: Step

    @classmethod
    def small(cls, layers: int = 3, width: int = 256, rows: int = 4096) -> Training:
        model = nn.Sequential(*(Block(width) for _ in range(layers))).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = Step(loss=lambda model, batch: model(batch).square().mean(), optimizer=optimizer)
        return cls(model, torch.randn(rows, width, device="cuda"), step)

    def plain(self) -> None:
        self.step.run(self.model, self.batch)

    def planned_ms(self, plan: Plan) -> float:
        with tightfit.apply(self.model, plan, step=self.step) as applied:

            def run() -> None:
                applied.loss(self.model, self.batch).backward()
                self.step.run_optimizers(self.model)

            run()  # checks itself
            return step_ms(run)


def step_ms(run: Callable[[], None], rounds: int = 3) -> float:
    """Return the shortest time of some steps."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)


def rows_of(training: Training, host: clock.Costs) -> Iterator[Row]:
    """Yield the plain step, the step with everything dropped, and the best one half-way between, at each ratio."""
    for _ in range(2):
        training.plain()
    with clock.ticking(host):
        profile = tightfit.measure(training.model, training.batch, step=training.step, cost_cache=False)
        host_ms = training.planned_ms(full_plan(profile, 2**50))
        tape_ms = host_ms - step_ms(training.plain)
    with counters.counted() as calls:
        training.plain()
    for ratio in RATIOS:
        kernel_us = 1e3 * ratio * host_ms / (calls.launches + HEAVY * calls.library_calls)
        with clock.ticking(replace(host, kernel_us=kernel_us, library_us=HEAVY * kernel_us)):
            profile = tightfit.measure(training.model, training.batch, step=training.step, cost_cache=False)
            solver = Solver(profile)
            plain = solver.plain(2**50)
            budget = (solver.smallest().peak_bytes + plain.plain_peak_bytes) // 2
            plain_ms = step_ms(training.plain)
            yield Row(ratio, "plain", plain.predicted_step_ms, plain_ms, plain_ms, tape_ms)
            for name, plan in (("all dropped", full_plan(profile, 2**50)), ("half-way", solver.solve(budget))):
                again = tuple(run_again(profile, plan))
                signatures = [profile.signatures[profile.ops[op].signature] for op in again]
                products = sum(signature.name.startswith("aten.addmm") for signature in signatures)
                kernels_ms = sum(signature.device_ms for signature in signatures)
                ms = training.planned_ms(plan)
                yield Row(ratio, name, plan.predicted_step_ms, ms, plain_ms, tape_ms, kernels_ms, products, again)


def run_again(profile: Profile, plan: Plan) -> Iterator[int]:
    """Yield the operations that a plan runs again."""
    for planned, region in zip(plan.regions, profile.regions, strict=True):
        if planned.recipe >= 0:
            yield from (region.first_op + op for op in plan.recipes[planned.recipe].replay)


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| kernels : Python | plan | predicted ms | emulated ms | off by | added ms | kernels again | products again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.ratio:g} | {row.plan} | {row.predicted_ms:.3f} | {row.ms:.3f} | {row.error:+.1%} | "
            f"{row.added_ms:.3f} | {row.kernels_ms:.3f} | {row.products} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="also write the table to this file")
    parser.add_argument("--processor", action="store_true", help="the host's time is the processor's, not counted")
    arguments = parser.parse_args()
    rows = []
    for row in rows_of(Training.small(), PROCESSOR if arguments.processor else COUNTED):
        print(f"{row.ratio:g} {row.plan}: {row.ms:.3f} ms", file=sys.stderr)
        rows.append(row)
    counted = "the processor's" if arguments.processor else "counted (0.5 us a call of Python's, 20 us a launch)"
    lines = [
        "# Steps on the emulated clock",
        "",
        f"Three blocks of normalisation, two products and small kernels. PyTorch {torch.__version__}; the host's "
        f"time is {counted}; `python -m tests.emulated_cuda.run python -m benchmarks.gpu_clock"
        f"{' --processor' if arguments.processor else ''}`.",
        "",
        f"Dropping everything adds {rows[0].tape_ms:.3f} ms to the host's time where kernels take none.",
        "",
        *table(rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
