"""The oracle against independent walks, and exact bytes by hand."""

from __future__ import annotations

import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.solver.profiles import STREAM, OpSpec, Own, chain_template, profile_of, random_profile
from tightfit.records import Decision, EventKind, Profile
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import fixed_peaks, region_curve, simulate


def naive_plain_peak(profile: Profile) -> int:
    """Peak of the plain step from the meaning of the events alone: who refers to which storage at each moment."""
    references: set[tuple[str, int]] = set()
    highest = 0
    for kind, a in profile.events:
        if kind == EventKind.ALLOC:
            references.add(("python", a))
        elif kind == EventKind.FREE:
            references.discard(("python", a))
        elif kind == EventKind.SAVE:
            references.add(("autograd", a))
        elif kind == EventKind.RELEASE:
            references.discard(("autograd", a))
        alive = {a if who == "python" else profile.values[profile.slots[a].value].storage for who, a in references}
        level = sum(profile.storages[s].nbytes for s in alive if profile.storages[s].component == "activation")
        if kind == EventKind.OP:
            level += profile.signatures[profile.ops[a].signature].workspace_bytes
        elif kind == EventKind.OTHER_OP:
            level += profile.signatures[a].workspace_bytes
        highest = max(highest, level)
    return highest + sum(profile.baseline.values()) + profile.correction_bytes + profile.margin_bytes


def random_plan(index: ProfileIndex, rng: random.Random) -> list[Decision | None]:
    plan: list[Decision | None] = []
    for region, facts in enumerate(index.facts):
        if rng.random() < 0.3:
            plan.append(None)
        else:
            plan.append(BY_VALUE.decide({index.local(v) for v in sorted(facts.optional) if rng.random() < 0.4}))
        assert region == facts.index
    return plan


def additive_peaks(index: ProfileIndex, plan: list[Decision | None]) -> list[int]:
    """Highest bytes within each event by adding up the regions' curves."""
    peaks = fixed_peaks(index)
    levels = [0] * len(peaks)
    spikes: dict[int, int] = {}
    for region, decision in enumerate(plan):
        curve = region_curve(index, region, decision)
        for time, delta in curve.deltas:
            for later in range(time, len(levels)):
                levels[later] += delta
        spikes.update(curve.spikes)
    highs = [peak + level for peak, level in zip(peaks, levels, strict=True)]
    return [max(high, highs[t - 1] + spikes[t] if t in spikes else 0) for t, high in enumerate(highs)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_plain_is_the_naive_walk(seed: int) -> None:
    profile = random_profile(seed)
    result = simulate(ProfileIndex(profile), [None] * len(profile.regions))
    assert result.peak_bytes == naive_plain_peak(profile)
    assert result.step_ms == profile.plain_step_ms
    assert result.replayed_ops == ()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_curves_add_up_to_the_simulation(seed: int) -> None:
    profile = random_profile(seed)
    index = ProfileIndex(profile)
    plan = random_plan(index, random.Random(seed))
    result = simulate(index, plan)
    curves = [region_curve(index, region, decision) for region, decision in enumerate(plan)]
    owners: dict[int, set[int]] = {}
    for region, curve in enumerate(curves):
        for storage, _, _ in curve.holds:
            owners.setdefault(storage, set()).add(region)
    bound = max(additive_peaks(index, plan))
    assert result.peak_bytes <= bound
    if all(len(regions) == 1 for regions in owners.values()):
        assert result.peak_bytes == bound
    assert sum(result.breakdown.values()) == result.peak_bytes
    assert result.replayed_ops == tuple(op for curve in curves for op in curve.replayed_ops)
    assert abs(result.step_ms - profile.plain_step_ms - sum(curve.overhead_ms for curve in curves)) < 1e-9


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_each_needed_operation_is_replayed_once_and_nothing_is_left(seed: int) -> None:
    profile = random_profile(seed)
    index = ProfileIndex(profile)
    plan = random_plan(index, random.Random(seed))
    for region, decision in enumerate(plan):
        curve = region_curve(index, region, decision)
        assert len(set(curve.replayed_ops)) == len(curve.replayed_ops)
        assert sum(delta for _, delta in curve.deltas) == 0
        if decision is not None:
            assert set(curve.replayed_ops) == set(index.needed_ops(region, decision.kept))


def test_spike_while_a_source_is_let_go() -> None:
    """Replay's result and the source that it is made from are in memory together for an instant."""
    first = (OpSpec(reads=(STREAM,), makes=(1000,), saves=()),)
    second = (OpSpec(reads=(STREAM,), makes=(400,), saves=(Own(0),)),)
    profile = profile_of([first, second], [0, 1])
    index = ProfileIndex(profile)
    result = simulate(index, [None, BY_VALUE.decide(())])
    # Forward: 1000 + 400. Backward: one gradient of 8 besides the source of 1000 and the replayed 400.
    assert result.peak_bytes == profile.baseline_bytes + 8 + 1000 + 400
    assert result.peak_where == "backward of layers.1#0"
    assert max(additive_peaks(index, [None, BY_VALUE.decide(())])) == result.peak_bytes


def test_writing_in_place_replays_on_a_copy_only_if_others_need_it() -> None:
    """relu_(x): the value before it is rebuilt, overwritten in place, and never there twice."""
    template = (
        OpSpec(reads=(STREAM,), makes=(64,), saves=()),
        OpSpec(reads=(Own(0),), mutates=(Own(0),), saves=(Own(1),)),
    )
    profile = profile_of([template], [0])
    index = ProfileIndex(profile)
    result = simulate(index, [BY_VALUE.decide(())])
    assert result.replayed_ops == (0, 1)
    assert result.peak_bytes == profile.baseline_bytes + 64 + 2 * 8
    # (op 1, output -1): the value that the in-place operation made is held instead, and nothing is replayed.
    assert simulate(index, [BY_VALUE.decide({(1, -1)})]).replayed_ops == ()


def test_several_outputs_one_replay() -> None:
    template = (
        OpSpec(reads=(STREAM,), makes=(64, 16), saves=(Own(0), Own(1))),
        OpSpec(reads=(Own(0),), makes=(32,), saves=(Own(2),)),
    )
    index = ProfileIndex(profile_of([template], [0]))
    assert simulate(index, [BY_VALUE.decide(())]).replayed_ops == (0, 1)
    assert simulate(index, [BY_VALUE.decide({(0, 0)})]).replayed_ops == (1, 0)
    assert simulate(index, [BY_VALUE.decide({(0, 0), (0, 1)})]).replayed_ops == (1,)


def test_overhead_counts_mode_and_tape() -> None:
    profile = profile_of([chain_template(4)], [0], mode_ms=0.5, tape_ms=0.25)
    index = ProfileIndex(profile)
    kept = {(1, 0), (2, 0), (3, 0)}
    assert simulate(index, [BY_VALUE.decide(kept)]).step_ms == profile.plain_step_ms + 1.0 + 4 * 0.5 + 1 * 0.25
    everything = kept | {(0, 0)}
    assert simulate(index, [BY_VALUE.decide(everything)]).step_ms == profile.plain_step_ms


def test_a_saved_value_in_a_baseline_storage_costs_nothing() -> None:
    """An operation that writes into a buffer and whose result is saved: the bytes are in the baseline already."""
    profile = profile_of([chain_template(1)], [0])
    storages = tuple(dataclasses.replace(s, component="buffers") if s.nbytes == 64 else s for s in profile.storages)
    index = ProfileIndex(dataclasses.replace(profile, storages=storages))
    curve = region_curve(index, 0, None)
    assert (curve.deltas, curve.holds) == ((), ())
    assert simulate(index, [None]).peak_bytes == max(additive_peaks(index, [None]))
