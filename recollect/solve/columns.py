"""Columns: one region with one decision, its cost in time and its memory at every moment.

The memory of a column is what `simulate.region_curve` says; nothing here predicts memory anew.  It is kept in two
parts: *private* bytes, which add up over regions, and *shared* holdings, storages that another region may hold too and
that are in memory once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from recollect.profile_index import ProfileIndex
from recollect.records import Decision, KeepSet
from recollect.simulate import fixed_peaks, region_curve


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Column:
    """One decision for one region, evaluated."""

    region: int
    decision: Decision
    overhead_ms: float
    held_bytes: int
    """Bytes that it holds when backward begins, shared ones included: for breaking ties."""
    deltas: Mapping[int, int]
    """Private bytes: change of level at each event."""
    extras: Mapping[int, int]
    """Events in which the column rises, for an instant, above its level after the event, and by how much."""
    shared: tuple[tuple[int, int, int], ...]
    """(storage, first event, event after the last) of each shared holding."""
    _times: list[int] = field(default_factory=list)
    _levels: list[int] = field(default_factory=list)
    _seen: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def at(self, time: int) -> tuple[int, tuple[int, ...]]:
        """Within event `time`: highest private bytes, and the shared storages held."""
        found = self._seen.get(time)
        if found is None:
            place = bisect_right(self._times, time)
            level = self._levels[place - 1] if place else 0
            storages = tuple(s for s, start, end in self.shared if start <= time < end)
            found = self._seen[time] = (level + self.extras.get(time, 0), storages)
        return found


class ColumnSource:
    """Makes and remembers the columns of every region of one profile."""

    def __init__(self, index: ProfileIndex) -> None:
        self.index = index
        self.base = fixed_peaks(index)
        self.holders = _holders(index)
        self._columns: list[dict[Decision, Column]] = [{} for _ in index.profile.regions]
        self._middle = index.backward_event()

    def column(self, region: int, decision: Decision) -> Column:
        """The column of `decision` in `region`; a decision that replays nothing is the same as None."""
        found = self._columns[region].get(decision)
        if found is None:
            found = self._columns[region][decision] = self._make(region, decision)
        return found

    def _make(self, region: int, decision: Decision) -> Column:
        curve = region_curve(self.index, region, decision)
        deltas = Counter(dict(curve.deltas))
        shared = [hold for hold in curve.holds if len(self.holders[hold[0]]) > 1]
        for storage, start, end in shared:
            nbytes = self.index.profile.storages[storage].nbytes
            deltas[start] -= nbytes
            deltas[end] += nbytes
        deltas.pop(len(self.base), None)
        spikes = dict(curve.spikes)
        # A storage let go at the event of a spike is still there during the spike.
        shared = [(storage, start, end + (end in spikes)) for storage, start, end in shared]
        extras = {t: spike - deltas[t] for t, spike in spikes.items()}
        held = sum(delta for t, delta in curve.deltas if t <= self._middle)
        changes = {t: delta for t, delta in sorted(deltas.items()) if delta}
        return Column(
            region=region,
            decision=decision,
            overhead_ms=curve.overhead_ms,
            held_bytes=held,
            deltas=changes,
            extras=extras,
            shared=tuple(shared),
            _times=list(changes),
            _levels=list(accumulate(changes.values())),
        )

    def peaks(self, chosen: Iterable[tuple[Column, float]]) -> list[float]:
        """Highest bytes within every event for columns taken with weights (1 for a plan; fractions in a relaxation)."""
        changes = [0.0] * (len(self.base) + 1)
        extras: Counter[int] = Counter()
        holds: dict[int, list[tuple[int, int, int, float]]] = {}
        for column, weight in chosen:
            for time, delta in column.deltas.items():
                changes[time] += weight * delta
            for time, extra in column.extras.items():
                extras[time] += weight * extra  # type: ignore[assignment]  # Counter of floats
            for storage, start, end in column.shared:
                holds.setdefault(storage, []).append((start, end, column.region, weight))
        for storage, intervals in holds.items():
            nbytes = self.index.profile.storages[storage].nbytes
            for time, change in _union_changes(intervals):
                changes[time] += change * nbytes
        levels = accumulate(changes[:-1])
        return [base + level + extras.get(t, 0) for t, (base, level) in enumerate(zip(self.base, levels, strict=True))]


def _union_changes(intervals: list[tuple[int, int, int, float]]) -> list[tuple[int, float]]:
    """How the largest weight that any one region holds changes over time."""
    if len(intervals) == 1:
        start, end, _, weight = intervals[0]
        return [(start, weight), (end, -weight)]
    times = sorted({time for start, end, _, _ in intervals for time in (start, end)})
    changes: list[tuple[int, float]] = []
    before = 0.0
    for time in times:
        sums: Counter[int] = Counter()
        for start, end, region, weight in intervals:
            if start <= time < end:
                sums[region] += weight  # type: ignore[assignment]  # Counter of floats
        now = max(sums.values(), default=0.0)
        changes.append((time, now - before))
        before = now
    return changes


def _holders(index: ProfileIndex) -> dict[int, set[int]]:
    """For each storage, the regions that some decision makes hold it."""
    profile = index.profile
    holders: dict[int, set[int]] = {}
    for facts in index.facts:
        saved = {profile.slots[slot].value for slot in facts.slots}
        read = {u for v in facts.droppable for u in profile.ops[profile.values[v].op].inputs}
        for value in saved | read:
            if not index.is_free(value):
                holders.setdefault(profile.values[value].storage, set()).add(facts.index)
    return holders


def useful_values(index: ProfileIndex, region: int) -> tuple[int, ...]:
    """Optional values that a keep set can gain by naming: saved, or read by an operation that may be replayed."""
    profile = index.profile
    facts = index.facts[region]
    if not facts.slots:
        return ()
    wanted = {profile.slots[slot].value for slot in facts.slots}
    stack = list(wanted)
    while stack:  # upwards from what is saved
        for value in profile.ops[profile.values[stack.pop()].op].inputs:
            if value in facts.own and value in facts.droppable and value not in wanted:
                wanted.add(value)
                stack.append(value)
    return tuple(sorted(wanted & facts.optional))


def keep_set(index: ProfileIndex, values: Iterable[int]) -> KeepSet:
    """Values of one region as a keep set."""
    return frozenset(index.local(value) for value in values)
