"""Follow the decisions of one plan in another: for batches of a similar size that takes milliseconds, not a solve."""

from __future__ import annotations

from collections.abc import Iterable

from tightfit.profiling.remeasure import operations
from tightfit.records import Decision, Plan, Profile, SharedTape
from tightfit.solver.plan_builder import build_plan
from tightfit.solver.solver import Solver

#: Plans whose decisions are tried.
_NEIGHBOURS = 4


def plans_like(others: Iterable[Plan], solver: Solver, budget_bytes: int) -> list[Plan]:
    """Return plans for the solver's profile that follow the first few of `others` whose decisions it can follow."""
    found: dict[tuple[tuple[Decision | None, ...], tuple[SharedTape, ...]], None] = {}
    for other in others:
        decisions = decisions_of(other, solver.profile)
        if decisions is not None:
            found[tuple(decisions), other.shared_tapes] = None
        if len(found) == _NEIGHBOURS:
            break
    plain = solver.plain_step()
    return [
        build_plan(solver.index, decisions, budget_bytes, plain=plain, shared_tapes=shared)
        for decisions, shared in found
    ]


def decisions_of(plan: Plan, profile: Profile) -> list[Decision | None] | None:
    """Return the plan's decisions for the regions of another profile; None if it has other regions or operations."""
    recipes = {region.key: plan.recipes[region.recipe] if region.recipe >= 0 else None for region in plan.regions}
    if plan.shared_tapes and [region.key for region in plan.regions] != [region.key for region in profile.regions]:
        return None
    decisions: list[Decision | None] = []
    for key, names in operations(profile):
        if key not in recipes:
            return None
        recipe = recipes[key]
        if recipe is not None and recipe.op_names != names:
            return None
        decisions.append(None if recipe is None else recipe.decision)
    return decisions
