"""Find the next budget that buys time."""

from __future__ import annotations

from tightfit.records import Plan
from tightfit.solver.solver import Solver


def next_useful_bytes(solver: Solver, plan: Plan, *, most_solves: int = 24) -> int | None:
    """Return the smallest budget above the plan's at which there is a faster plan; None if nothing is faster.

    Bisection over budgets, as time never increases with the budget; where a faster plan is found, the smallest budget
    for its own peak is the next upper end, so few solves are needed.  With more than `most_solves`, the answer is the
    smallest budget found so far that buys time: at most that much too large.
    """
    plain = solver.plain(plan.budget_bytes)
    if plan.predicted_step_ms <= plain.predicted_step_ms:
        return None
    useful = max(plain.predicted_peak_bytes, plan.budget_bytes + 1)
    useless = plan.budget_bytes
    for _ in range(most_solves):
        if useful - useless <= 1:
            break
        middle = (useless + useful) // 2
        found = solver.solve(middle)
        if found.predicted_step_ms < plan.predicted_step_ms:
            useful = max(useless + 1, min(middle, solver.least_budget(found.predicted_peak_bytes)))
        else:
            useless = middle
    return useful
