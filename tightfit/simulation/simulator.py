"""Predict peak memory and step time: the one oracle.

Given a profile and a decision for every region, `simulate` walks the profile's events and does with bytes exactly what
the engine does with tensors: which storages live when, what is recomputed at which read, and when it is freed.  What a
region holds under its decision, its lever's model says.  Nothing else in tightfit predicts memory.

Memory is additive over regions: a region's decision changes only what the region itself holds, so

    bytes(moment) = baseline + fixed(moment) + sum over regions of conditional(region, decision, moment)

where *fixed* is what lives whatever is decided (natural lifetimes, saved tensors that a region did not make or may not
recompute) and *conditional* is what `region_curve` returns.  The sum counts a storage twice if two regions hold it
at the same time, so it is an upper bound there; a curve therefore names its holdings (`RegionCurve.holds`), with which
`solve` counts such a storage once.  `simulate` itself counts each storage once.

What it does not see: memory that an operation takes in other ways than its measured workspace.  Where the allocator
reserves more than is allocated, `tightfit.simulation.reserved` adds that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from tightfit.records import Decision, EventKind, Profile, SharedTape, Stretch, step_ms
from tightfit.simulation.levers import BY_VALUE, NOTHING, Happening, RegionModel, UntouchedModel, lever_named
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.walked_events import walked_events

INFINITY = float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionCurve:
    """What one decision for one region adds to memory and time, beyond what is fixed."""

    deltas: tuple[tuple[int, int], ...]
    """(event, bytes): the level changes by so much at that event and stays; sorted by event."""
    spikes: tuple[tuple[int, int], ...]
    """(event, bytes): within that event the level is so much above the level *before* the event, for an instant."""
    holds: tuple[tuple[int, int, int], ...]
    """(storage, first event, event after the last): the part of the deltas that is a storage held beyond its fixed
    life. Another region may hold the same storage at the same time; in memory it is there once."""
    replayed_ops: tuple[int, ...]
    """Operations recomputed, in that order."""
    added: tuple[tuple[int, Stretch], ...]
    """(event, work): what is done within that event of each pass: recomputation, and the lever's own work."""
    overhead_ms: float
    """What the decision adds to the host's time of the step."""


def _model_of(index: ProfileIndex, region: int, decision: Decision | None) -> RegionModel:
    if decision is None:
        return UntouchedModel(index, region)
    return lever_named(decision.lever).model(index, region, decision)


def _replay_ms(profile: Profile, replayed_ops: Iterable[int]) -> float:
    return sum(profile.signatures[profile.ops[op].signature].slower_ms for op in replayed_ops)


def _happenings(
    index: ProfileIndex, region: int, decision: Decision | None
) -> tuple[Sequence[Happening], Sequence[int]]:
    """Return what a decision does at which event of a region, and the operations that are recomputed."""
    if decision is not None and decision.lever == BY_VALUE.name:
        found = BY_VALUE.happenings(index, region, decision)
        if found is not None:
            return found
    model, events = _model_of(index, region, decision), index.profile.events
    moments = [(time, model.handle(*events[time])) for time in index.events_of_region[region]]
    return moments, model.replayed_ops


def region_curve(index: ProfileIndex, region: int, decision: Decision | None) -> RegionCurve:
    """Return the memory and time that a decision adds for a region, beyond what is fixed."""
    profile = index.profile
    deltas: Counter[int] = Counter()
    spikes: list[tuple[int, int]] = []
    held: Counter[int] = Counter()
    added: list[tuple[int, Stretch]] = []

    def change(time: int, storage: int, sign: int) -> None:
        deltas[time] += sign * profile.storages[storage].nbytes

    opened: dict[int, int] = {}
    intervals: list[tuple[int, int, int]] = []
    happenings, replayed_ops = _happenings(index, region, decision)
    for time, moment in happenings:
        if moment is NOTHING:
            continue
        for storage in moment.acquired:
            held[storage] += 1
            if held[storage] == 1:
                opened[storage] = time
        for storage in moment.released:
            held[storage] -= 1
            if held[storage] == 0:
                intervals.append((storage, opened.pop(storage), time))
        deltas[time] += moment.memo_delta
        if moment.added is not None:
            added.append((time, moment.added))
        # As high as the level after the event, and higher than it if a source is let go within the event.
        if moment.spike > moment.memo_delta or (moment.spike > 0 and moment.released):
            spikes.append((time, moment.spike))
    intervals.extend((storage, start, len(profile.events)) for storage, start in opened.items())
    holds: list[tuple[int, int, int]] = []
    for storage, start, end in intervals:  # only the part in which nothing else keeps the storage alive
        inside = sorted(
            {start, end}
            | {t for t in index.fixed_births(storage) if start < t < end}
            | {t for t in index.fixed_deaths(storage) if start < t < end}
        )
        for a, b in pairwise(inside):
            if not index.fixed_at(storage, a) and not index.is_resident(storage):
                holds.append((storage, a, b))
                change(a, storage, +1)
                if b < len(profile.events):
                    change(b, storage, -1)
    return RegionCurve(
        deltas=tuple(sorted((t, d) for t, d in deltas.items() if d)),
        spikes=tuple(spikes),
        holds=tuple(sorted(holds)),
        replayed_ops=tuple(replayed_ops),
        added=tuple(added),
        overhead_ms=profile.accumulation_steps * sum(work.host_ms for _, work in added),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """The predicted step."""

    peak_bytes: int
    """In the budget's terms: baseline, corrections and margin included."""
    peak_event: int
    """Index into `Profile.events`."""
    peak_where: str
    """For people: a region's key, ``backward of KEY``, ``backward`` or ``optimizer step``."""
    breakdown: dict[str, int]
    """Bytes at the peak by component; they add up to `peak_bytes`."""
    step_ms: float
    replay_ms: float
    replayed_ops: tuple[int, ...]
    """Forward operations recomputed, in order of regions."""
    allocated_bytes: int
    reserved_bytes: int
    """What the allocator reserves; the peak where that is no more than what is allocated."""
    flushes: int = 0
    """As `Plan.flushes_per_step`."""


def fixed_peaks(index: ProfileIndex) -> list[int]:
    """Return the highest bytes within each event of what is fixed, resident memory and corrections included."""
    profile = index.profile
    offset = profile.baseline_bytes + profile.correction_bytes + profile.margin_bytes
    return [offset + level + index.fixed_spikes.get(time, 0) for time, level in enumerate(index.fixed_levels)]


#: Events in which a region's model has a part.  (Not a set: an enumeration's members hash slowly.)
OF_A_REGION = (
    EventKind.OP, EventKind.SAVE, EventKind.UNPACK, EventKind.READ, EventKind.RELEASE, EventKind.EXIT
)  # fmt: skip


def models_of(
    index: ProfileIndex, decisions: Sequence[Decision | None], shared_tapes: Sequence[SharedTape]
) -> list[RegionModel]:
    """Return what each region holds: one model for all that share a tape."""
    models: list[RegionModel] = []
    shared_from = {shared.first: shared for shared in shared_tapes}
    while len(models) < len(decisions):
        region = len(models)
        shared = shared_from.get(region)
        if shared is None:
            models.append(_model_of(index, region, decisions[region]))
        else:
            several = decisions[region : region + shared.count]
            models += [BY_VALUE.shared_model(index, shared, several)] * shared.count
    return models


class Moment(NamedTuple):
    """The most that is held within one event of a step, resident memory and corrections left out."""

    event: int
    """Index into `Profile.events`."""
    total_bytes: int
    recomputed_bytes: int
    """Of it, what recomputation made."""
    workspace_bytes: int
    """Of it, what one operation takes for itself."""
    added_ms: float
    """What recomputation adds to the event's time."""


class TooHigh(Exception):
    """A walk was given up: the step holds more than was asked for."""


def simulate(
    index: ProfileIndex,
    decisions: Sequence[Decision | None],
    shared_tapes: Sequence[SharedTape] = (),
    *,
    trace: list[Moment] | None = None,
    most_bytes: float = INFINITY,
) -> Simulation:
    """Walk the step with one decision per region (`None`: untouched).

    A storage held by several regions is counted once, so the peak is never above what the sum of `region_curve`s says.
    Where `trace` is given, each event is appended to it, those left out that only free memory.

    Raises:
        TooHigh: the peak is above `most_bytes`.
    """
    profile = index.profile
    models = models_of(index, decisions, shared_tapes)
    # This loop is most of the time that a plan for a long chain takes: what is asked at every event is looked up first.
    nbytes_of = index.activation_bytes
    held = [0] * len(nbytes_of)
    level = memo = 0
    peak = peak_memo = peak_workspace = -1
    peak_event = 0
    current = -1
    where_region = -1
    phase = "forward"
    peak_label = ""
    components_at_peak: dict[str, int] = {}
    added: dict[int, Stretch] = {}
    offset = profile.baseline_bytes + profile.correction_bytes + profile.margin_bytes
    events = index.walked_events
    if trace is not None:
        events = walked_events(profile, index.region_of_op, index.fixed_slots, summed_up=False)
    for time, kind, a, owner, fixed_storage, workspace, change in events:
        memo_before, before = memo, level + memo
        spike = 0
        if kind is None:
            level += change
            if time < 0:
                continue  # no higher than it was
            high = before + a
        elif kind == EventKind.FREE:
            held[a] -= 1
            if held[a] == 0:
                level -= nbytes_of[a]
            continue
        else:
            if owner >= 0:
                if kind == EventKind.EXIT:
                    current = -1
                if phase == "backward":
                    where_region = owner
                model = models[owner]
                moment = model.handle(kind, a)
                if fixed_storage >= 0 and a not in model.slots:
                    held[fixed_storage] += 1 if kind == EventKind.SAVE else -1
                    if held[fixed_storage] == (kind == EventKind.SAVE):
                        level += nbytes_of[fixed_storage] * (1 if kind == EventKind.SAVE else -1)
                if moment is not NOTHING:
                    if moment.added is not None:
                        added[time] = moment.added
                    memo += moment.memo_delta
                    spike = moment.spike
                    for storage in moment.acquired:
                        held[storage] += 1
                        if held[storage] == 1:
                            level += nbytes_of[storage]
                    for storage in moment.released:
                        held[storage] -= 1
                        if held[storage] == 0:
                            level -= nbytes_of[storage]
            elif kind == EventKind.ALLOC:
                held[a] += 1
                if held[a] == 1:
                    level += nbytes_of[a]
            elif kind == EventKind.ENTER:
                current = a
            elif kind == EventKind.KEEPING:
                several = {id(model): model for model in models}.values()
                memo += sum(model.handle(kind, a).memo_delta for model in several)
            elif kind == EventKind.BACKWARD:
                phase = "backward"
            elif kind == EventKind.OPTIMIZER:
                phase = "optimizer"
            high = level + memo + workspace
            if before + spike > high:
                high = before + spike
        if trace is None and high <= peak:
            continue
        in_replay = spike > 0 and before + spike == high
        recomputed, within_op = (memo_before + spike, 0) if in_replay else (memo, workspace)
        if trace is not None:
            trace.append(Moment(time, high, recomputed, within_op, added[time].ms if time in added else 0.0))
        if high > peak:
            if high + offset > most_bytes:
                raise TooHigh
            peak, peak_event, peak_memo, peak_workspace = high, time, recomputed, within_op
            components_at_peak = {"activations": high - peak_memo - peak_workspace}
            if phase == "optimizer":
                peak_label = "optimizer step"
            elif phase == "backward":
                peak_label = f"backward of {profile.regions[where_region].key}" if where_region >= 0 else "backward"
            else:
                peak_label = profile.regions[current].key if current >= 0 else "forward"
    if peak < 0:
        peak = 0
        components_at_peak = {"activations": 0}
        peak_memo = peak_workspace = 0
    if index.has_device_times:
        predicted_ms = step_ms(index.work_under(decisions), added, profile.accumulation_steps)
    else:
        predicted_ms = index.plain_step_ms + profile.accumulation_steps * sum(work.host_ms for work in added.values())
    replay_total = 0.0
    replayed: list[int] = []
    for model in {id(model): model for model in models}.values():
        replay_total += _replay_ms(profile, model.replayed_ops)
        replayed += model.replayed_ops
    breakdown = {
        **profile.baseline,
        "activations": components_at_peak["activations"],
        "replay": peak_memo,
        "workspace": peak_workspace,
        "correction": profile.correction_bytes + profile.margin_bytes,
    }
    return Simulation(
        peak_bytes=peak + offset,
        peak_event=peak_event,
        peak_where=peak_label or "parameters and optimizer state",
        breakdown=breakdown,
        step_ms=predicted_ms,
        replay_ms=replay_total,
        replayed_ops=tuple(replayed),
        allocated_bytes=peak + offset,
        reserved_bytes=peak + offset,
    )
