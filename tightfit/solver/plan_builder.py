"""Build a plan from one decision for every region, with every figure from the simulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tightfit.records import Decision, Plan, PlannedRegion, Recipe, SharedTape
from tightfit.simulation.levers import BY_VALUE, lever_named
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.reserved import simulate_in_totals
from tightfit.simulation.simulator import Simulation


def build_plan(
    index: ProfileIndex,
    decisions: Sequence[Decision | None],
    budget_bytes: int,
    added_ms_bound: float = 0.0,
    plain: Simulation | None = None,
    shared_tapes: Sequence[SharedTape] = (),
) -> Plan:
    """Return the plan that follows the decisions; it may need more than the budget, which is only recorded."""
    profile = index.profile
    plain = plain or simulate_in_totals(index, [None] * len(profile.regions))
    changes_nothing = not shared_tapes and all(decision is None for decision in decisions)
    planned = plain if changes_nothing else simulate_in_totals(index, decisions, shared_tapes)
    recipes: dict[Recipe, int] = {}
    numbers = [-1] * len(decisions)
    for region, recipe in _recipes(index, decisions, shared_tapes):
        numbers[region] = recipes.setdefault(recipe, len(recipes))
    regions = [PlannedRegion(key=r.key, recipe=number) for r, number in zip(profile.regions, numbers, strict=True)]
    # Rounded to a picosecond, so that plans of equal operations in another order are equally fast.
    step_ms, plain_ms = round(planned.step_ms, 9), round(plain.step_ms, 9)
    return Plan(
        budget_bytes=budget_bytes,
        predicted_peak_bytes=planned.peak_bytes,
        peak_where=planned.peak_where,
        baseline_bytes=profile.baseline_bytes,
        breakdown=planned.breakdown,
        predicted_step_ms=step_ms,
        plain_step_ms=plain_ms,
        plain_peak_bytes=plain.peak_bytes,
        overhead_ratio=step_ms / plain_ms - 1 if plain_ms > 0 else 0.0,
        lower_bound_ms=min(step_ms, plain_ms + added_ms_bound),
        regions=tuple(regions),
        recipes=tuple(recipes),
        region_paths=profile.region_paths,
        shared_tapes=tuple(shared_tapes),
        model=profile.model,
        fingerprint=profile.fingerprint,
        batch=profile.batch,
        device=profile.device,
        optimizer=profile.optimizer,
        excluded=profile.excluded,
        checkpoints=profile.checkpoints,
        predicted_allocated_bytes=planned.allocated_bytes,
        predicted_reserved_bytes=planned.reserved_bytes,
        flushes_per_step=planned.flushes,
    )


def _recipes(
    index: ProfileIndex, decisions: Sequence[Decision | None], shared_tapes: Sequence[SharedTape]
) -> Iterator[tuple[int, Recipe]]:
    """Yield each region that follows a recipe, with that recipe."""
    alone = {region: decision for region, decision in enumerate(decisions) if decision is not None}
    for shared in shared_tapes:
        several = range(shared.first, shared.first + shared.count)
        recipes = BY_VALUE.shared_recipes(index, shared, [decisions[region] for region in several])
        for region, recipe in zip(several, recipes, strict=True):
            alone.pop(region, None)
            yield region, recipe
    for region, decision in alone.items():
        found = lever_named(decision.lever).recipe(index, region, decision)
        if found is not None:
            yield region, found
