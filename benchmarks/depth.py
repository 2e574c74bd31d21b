"""How little memory a deep chain can train in: plans below one level of replay against depth.

    python benchmarks/depth.py

A residual MLP (one module a layer) and a recurrent network written as a Python loop (all steps in one region), of
doubling depth.  For each, the smallest peak of every kind of plan, above parameters, gradients and batch:

* plain, and one level: every region fully dropped, what passes between regions held;
* square root: the smallest plan that replays no operation more than once more than one level does (at most twice the
  operations of forward in all);
* smallest: whatever it takes.

The peak is measured by the profiler's memory events, gradients are compared bit for bit with the plain step's, and the
time is the ratio of medians of interleaved steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import tightfit
from tightfit.device import memory as meter
from tightfit.planning.reuse import decisions_of
from tightfit.records import Plan, Profile
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver.plan_builder import build_plan
from tightfit.solver.recursive import RecursivePlans
from tightfit.solver.solver import Solver

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.chains import RNN, ResidualMLP

DEPTHS = (50, 100, 200)
ROUNDS = 7


def plans(profile: Profile) -> dict[str, Plan]:
    """The smallest plan of each kind."""
    index = ProfileIndex(profile)
    solver = Solver(profile)
    nested = RecursivePlans(index).within(float("inf"))
    one_level = solver.solve(solver.smallest_at_one_level().peak_bytes)
    at_most = 2 * len(profile.ops)
    root = min((c for c in nested if len(c.simulation.replayed_ops) <= at_most), key=lambda c: c.simulation.peak_bytes)
    return {
        "plain": solver.plain(2**50),
        "one level": one_level,
        "square root": build_plan(index, root.decisions, root.simulation.peak_bytes, shared_tapes=root.shared_tapes),
        "smallest": solver.solve(solver.minimum_budget()[0]),
    }


def replays(profile: Profile, plan: Plan) -> int:
    """Operations replayed in one step, as predicted."""
    decisions = decisions_of(plan, profile)
    assert decisions is not None
    return len(simulate(ProfileIndex(profile), decisions, plan.shared_tapes).replayed_ops)


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of all gradients."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def step_ms(model: nn.Module, batch: Tensor, applied: tightfit.Applied | None) -> float:
    """One forward and backward."""
    model.zero_grad(set_to_none=False)
    begin = time.perf_counter()
    (applied.loss(model, batch) if applied is not None else model(batch)).backward()
    return (time.perf_counter() - begin) * 1e3


def row(name: str, depth: int, model: nn.Module, batch: Tensor, profile: Profile, kind: str, plan: Plan) -> str:
    """One line of the table."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step_ms(model, batch, None)
    plain = gradients(model)
    with tightfit.apply(model, plan) as applied:
        step_ms(model, batch, applied)  # the self-check
        resident = meter.resident_bytes(model, batch)
        _, peak_bytes = meter.measure_peak(lambda: step_ms(model, batch, applied), resident)
        equal = all(torch.equal(a, b) for a, b in zip(plain, gradients(model), strict=True))
        planned_ms, plain_ms = [], []
        for _ in range(ROUNDS):
            planned_ms.append(step_ms(model, batch, applied))
            with applied.paused():
                plain_ms.append(step_ms(model, batch, None))
    kib = 1024
    return (
        f"| {name} | {depth} | {kind} | {(plan.predicted_peak_bytes - profile.baseline_bytes) / kib:,.1f} | "
        f"{(peak_bytes - profile.baseline_bytes) / kib:,.1f} | {replays(profile, plan) / len(profile.ops):.2f} | "
        f"{statistics.median(planned_ms) / statistics.median(plain_ms):.2f} | {'yes' if equal else 'NO'} |"
    )


def main() -> None:
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {ROUNDS} interleaved rounds")
    print()
    print("| model | depth | plan | predicted KiB | measured KiB | replays per operation | time / plain | bit-equal |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("residual MLP", "RNN loop"):
        for depth in DEPTHS:
            torch.manual_seed(0)
            model: nn.Module = ResidualMLP(depth, 64) if name == "residual MLP" else RNN(64)
            batch = torch.randn(1024, 64) if name == "residual MLP" else torch.randn(depth, 512, 64)
            profile = tightfit.measure(model, batch)
            for kind, plan in plans(profile).items():
                print(row(name, depth, model, batch, profile, kind, plan), flush=True)


if __name__ == "__main__":
    main()
