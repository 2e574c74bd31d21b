"""From one decision for every region to a Plan, with every figure from `simulate`."""

from __future__ import annotations

from collections.abc import Sequence

from recollect.profile_index import ProfileIndex
from recollect.records import Decision, KeepSet, KeptValue, Plan, PlannedRegion, Recipe
from recollect.simulate import Simulation, region_curve, simulate

_OVERWRITTEN = "overwritten later"
_NO_WAY_BACK = "made from a value that is overwritten later or must be kept"


def build_plan(
    index: ProfileIndex,
    decisions: Sequence[Decision],
    budget_bytes: int,
    added_ms_bound: float = 0.0,
    plain: Simulation | None = None,
) -> Plan:
    """The plan that follows `decisions`; it may need more than the budget, which is only recorded."""
    profile = index.profile
    plain = plain or simulate(index, [None] * len(profile.regions))
    planned = simulate(index, decisions)
    recipes: dict[Recipe, int] = {}
    regions = []
    for region, decision in enumerate(decisions):
        number = -1
        if decision is not None and index.needed_ops(region, decision):
            number = recipes.setdefault(_recipe(index, region, decision), len(recipes))
        regions.append(PlannedRegion(key=profile.regions[region].key, recipe=number))
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
        model=profile.model,
        fingerprint=profile.fingerprint,
        batch=profile.batch,
        device=profile.device,
        optimizer=profile.optimizer,
    )


def _recipe(index: ProfileIndex, region: int, keep: KeepSet) -> Recipe:
    profile = index.profile
    record = profile.regions[region]
    facts = index.facts[region]
    kept = index.keep_values(region, keep)
    needed = index.needed_ops(region, keep)
    saved = {profile.slots[slot].value for slot in facts.slots}
    read = {value for op in needed for value in profile.ops[op].inputs}
    dropped = saved - kept
    sources = {v for v in read if v not in facts.own or v in kept or v not in facts.droppable}
    held = {profile.values[v].storage for v in sources | (saved & kept) | _fixed_savings(index, region)}
    curve = region_curve(index, region, keep)
    return Recipe(
        class_id=record.class_id,
        op_names=tuple(
            profile.signatures[profile.ops[op].signature].name
            for op in range(record.first_op, record.first_op + record.op_count)
        ),
        keep=tuple(sorted(index.local(v) for v in kept if v in saved or v in read)),
        drop=tuple(sorted(index.local(v) for v in dropped)),
        replay=tuple(sorted(op - record.first_op for op in needed)),
        held_bytes=sum(profile.storages[s].nbytes for s in held if not index.is_baseline(s)),
        dropped_bytes=sum(
            profile.storages[s].nbytes
            for s in {profile.values[v].storage for v in dropped} - held
            if not index.is_baseline(s)
        ),
        replay_ms=round(curve.replay_ms, 9),
        kept_for_safety=_kept_for_safety(index, region),
    )


def _fixed_savings(index: ProfileIndex, region: int) -> set[int]:
    """Values that autograd saves in the region and that no decision may drop."""
    free = set(index.facts[region].slots)
    return {index.profile.slots[slot].value for slot in index.slots_of_region[region] if slot not in free}


def _kept_for_safety(index: ProfileIndex, region: int) -> tuple[KeptValue, ...]:
    profile = index.profile
    facts = index.facts[region]
    kept = []
    for value in sorted(_fixed_savings(index, region) & facts.own):
        op = profile.ops[profile.values[value].op]
        reason = op.keep_reason or (_OVERWRITTEN if profile.values[value].overwritten else _NO_WAY_BACK)
        if not index.is_free(value):
            name = profile.signatures[op.signature].name
            kept.append(KeptValue(op=name, reason=reason, nbytes=index.nbytes(value)))
    return tuple(kept)
