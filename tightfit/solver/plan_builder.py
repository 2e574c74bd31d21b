"""From one decision for every region to a Plan, with every figure from `simulate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tightfit.records import RERUN, Decision, Group, KeptValue, Plan, PlannedRegion, Recipe
from tightfit.simulation.profile_index import ProfileIndex, RegionFacts
from tightfit.simulation.simulator import Simulation, simulate

_OVERWRITTEN = "overwritten later"
_NO_WAY_BACK = "made from a value that is overwritten later or must be kept"


def build_plan(
    index: ProfileIndex,
    decisions: Sequence[Decision],
    budget_bytes: int,
    added_ms_bound: float = 0.0,
    plain: Simulation | None = None,
    groups: Sequence[Group] = (),
) -> Plan:
    """The plan that follows `decisions`; it may need more than the budget, which is only recorded."""
    profile = index.profile
    plain = plain or simulate(index, [None] * len(profile.regions))
    planned = simulate(index, decisions, groups)
    recipes: dict[Recipe, int] = {}
    numbers = [-1] * len(decisions)
    for first, count in [*((g.first, g.count) for g in groups), *((r, 1) for r in _ungrouped(decisions, groups))]:
        if count == 1 and decisions[first] is RERUN:
            numbers[first] = recipes.setdefault(_rerun_recipe(index, first), len(recipes))
            continue
        tape = _tape(index, first, decisions[first : first + count])
        if count > 1 or tape.needed:
            for region in range(first, first + count):
                numbers[region] = recipes.setdefault(_recipe(tape, region), len(recipes))
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
        groups=tuple(groups),
        model=profile.model,
        fingerprint=profile.fingerprint,
        batch=profile.batch,
        device=profile.device,
        optimizer=profile.optimizer,
    )


def _ungrouped(decisions: Sequence[Decision], groups: Sequence[Group]) -> list[int]:
    """Regions with a decision and a tape of their own."""
    grouped = {region for group in groups for region in range(group.first, group.first + group.count)}
    return [r for r, decision in enumerate(decisions) if decision is not None and r not in grouped]


@dataclass(frozen=True, slots=True)
class _Tape:
    """What the tape of a region, or of a group of regions, keeps and replays."""

    index: ProfileIndex
    facts: RegionFacts
    kept: frozenset[int]
    needed: frozenset[int]
    read: frozenset[int]
    """Values that replay reads."""
    saved: frozenset[int]
    """Values that are saved and may be dropped."""


def _tape(index: ProfileIndex, first: int, decisions: Sequence[Decision]) -> _Tape:
    profile = index.profile
    facts = index.group_facts(first, len(decisions))
    kept = index.kept_values(facts, first, decisions)
    needed = index.rebuilding_ops(facts, kept)
    return _Tape(
        index,
        facts,
        kept,
        needed,
        read=frozenset(value for op in needed for value in profile.ops[op].inputs),
        saved=frozenset(profile.slots[slot].value for slot in facts.slots),
    )


def _recipe(tape: _Tape, region: int) -> Recipe:
    """The part of a tape that is about one of its regions."""
    index, facts = tape.index, tape.facts
    profile = index.profile
    record = profile.regions[region]
    ops = range(record.first_op, record.first_op + record.op_count)
    own = {value for op in ops for value in profile.ops[op].outputs}
    needed = [op for op in ops if op in tape.needed]
    saved, kept = tape.saved & own, tape.kept & own
    dropped = saved - kept
    read = {value for op in needed for value in profile.ops[op].inputs}
    sources = {v for v in read if v not in facts.own or v in tape.kept or v not in facts.droppable}
    slots = set(facts.slots)
    fixed = {profile.slots[slot].value for slot in index.slots_of_region[region] if slot not in slots}
    held = {profile.values[v].storage for v in sources | (saved & kept) | fixed}
    return Recipe(
        class_id=record.class_id,
        op_names=tuple(profile.signatures[profile.ops[op].signature].name for op in ops),
        keep=tuple(sorted(index.local(v) for v in kept & (saved | tape.read))),
        drop=tuple(sorted(index.local(v) for v in dropped)),
        replay=tuple(op - record.first_op for op in needed),
        held_bytes=sum(profile.storages[s].nbytes for s in held if not index.is_baseline(s)),
        dropped_bytes=sum(
            profile.storages[s].nbytes
            for s in {profile.values[v].storage for v in dropped} - held
            if not index.is_baseline(s)
        ),
        replay_ms=round(sum(profile.signatures[profile.ops[op].signature].ms for op in needed), 9),
        kept_for_safety=_kept_for_safety(index, fixed & own),
    )


def _rerun_recipe(index: ProfileIndex, region: int) -> Recipe:
    """For a region whose module is run again as a whole."""
    profile = index.profile
    record = profile.regions[region]
    facts = index.facts[region]
    ops = range(record.first_op, record.first_op + record.op_count)
    again = index.rerun_ops(region)
    arguments = {profile.values[v].storage for op in ops for v in profile.ops[op].inputs if v not in facts.own}
    dropped = {profile.slots[slot].value for slot in facts.slots}
    return Recipe(
        class_id=record.class_id,
        op_names=tuple(profile.signatures[profile.ops[op].signature].name for op in ops),
        keep=(),
        drop=tuple(sorted(index.local(value) for value in dropped)),
        replay=tuple(sorted(op - record.first_op for op in again)),
        held_bytes=sum(profile.storages[s].nbytes for s in arguments if not index.is_baseline(s)),
        dropped_bytes=sum(profile.storages[s].nbytes for s in {profile.values[v].storage for v in dropped}),
        replay_ms=round(sum(profile.signatures[profile.ops[op].signature].ms for op in again), 9),
        rerun=True,
    )


def _kept_for_safety(index: ProfileIndex, fixed: Iterable[int]) -> tuple[KeptValue, ...]:
    profile = index.profile
    kept = []
    for value in sorted(fixed):
        op = profile.ops[profile.values[value].op]
        reason = op.keep_reason or (_OVERWRITTEN if profile.values[value].overwritten else _NO_WAY_BACK)
        if not index.is_free(value):
            name = profile.signatures[op.signature].name
            kept.append(KeptValue(op=name, reason=reason, nbytes=index.nbytes(value)))
    return tuple(kept)
