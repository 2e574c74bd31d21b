"""Solve for several budgets, from the smallest that runs to the plain peak: the curve of time against budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tightfit.errors import UnsupportedInput
from tightfit.progress import progress, showing_when_long
from tightfit.records import Plan, Profile
from tightfit.solver.solver import Solver, solver_of


@showing_when_long()
def frontier(profile: Profile, points: int = 20) -> list[Plan]:
    """Return the curve of best step time against budget.

        for plan in tightfit.frontier(profile, points=20):
            print(plan.budget_bytes, plan.predicted_peak_bytes, plan.predicted_step_ms)

    Needs no PyTorch.  What a run of a plan shows beyond the prediction is in the profile of a `fit`
    (`Applied.profile`): its smallest budget ran.  So did that of a profile of `measure` with opaque calls, unless their
    names are in `Profile.unproven`.

    Args:
        profile: a measured step.
        points: how many budgets, evenly spaced in bytes from the smallest that runs to the plain peak, both included.

    Returns:
        A plan for each of these budgets and for the smallest one that needs no recursive recomputation, in rising order
        of budget; `predicted_step_ms` never rises. Where budgets fall together, there are fewer: a step from
        which nothing can be dropped has one.

    Raises:
        UnsupportedInput: fewer than two points.
    """
    return frontier_of(solver_of(profile), points)


def frontier_of(solver: Solver, points: int = 20, *, also: Sequence[int] = ()) -> list[Plan]:
    """Return `frontier` for a solver, with a plan for each budget of `also` that is large enough to run."""
    check_points(points)
    least_bytes, _ = solver.minimum_budget()
    plain_bytes = solver.plain(0).plain_peak_bytes
    span_bytes = plain_bytes - least_bytes
    budgets = {least_bytes + span_bytes * place // (points - 1) for place in range(points)}
    budgets.add(solver.least_budget(solver.smallest_at_one_level().peak_bytes))
    budgets.update(budget for budget in also if budget >= least_bytes)
    # In rising order, so that the solver can use a plan for a smaller budget where its search finds only slower ones.
    plans: list[Plan] = []
    for budget in sorted(budgets):
        progress("solving for budgets", len(plans), len(budgets))
        plans.append(solver.solve(budget))
    return _with_tightest_bounds(plans)


def _with_tightest_bounds(plans: list[Plan]) -> list[Plan]:
    """Give each plan the best bound of all: what no plan can beat within a budget, none can within a smaller one.

    Not so for recursive recomputation, of which the bound says nothing.
    """
    tightened = []
    bound_ms = 0.0
    for plan in reversed(plans):
        if not plan.shared_tapes:
            bound_ms = min(max(bound_ms, plan.lower_bound_ms), plan.predicted_step_ms)
            plan = replace(plan, lower_bound_ms=bound_ms)
        tightened.append(plan)
    return tightened[::-1]


def check_points(points: int) -> None:
    """Raise `UnsupportedInput` where so many points are no curve."""
    if points < 2:
        raise UnsupportedInput(
            f"the number of points is {points}, but a curve needs its two ends: the smallest budget and the plain "
            f"peak. Give at least 2 points."
        )
