"""Evaluate columns: one region with one decision, its cost in time and its memory at every moment.

The memory of a column is what `simulate.region_curve` says; nothing here predicts memory anew.  It is kept in two
parts: *private* bytes, which add up over regions, and *shared* holdings, storages that another region may hold too and
that are in memory once.  Regions whose part of the timeline looks the same (`patterns`) share one evaluation.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from tightfit.records import Decision, Profile, Stretch
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import fixed_peaks, region_curve
from tightfit.solver.effort import SEARCH_WORK, Effort
from tightfit.solver.region_timelines import Timeline, timelines
from tightfit.solver.time_cuts import Array, Cut, TimeCuts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shape:
    """One decision for all regions of a pattern: times are ranks, storages are places (see `patterns`)."""

    overhead_ms: float
    work: tuple[tuple[int, Stretch], ...]
    """(rank, what is done within that moment of each pass)."""
    held_bytes: int
    deltas: tuple[tuple[int, int], ...]
    """(rank, private bytes): changes of level."""
    extras: Mapping[int, int]
    """Rank of a moment in which the level is higher for an instant, and by how much."""
    shared: tuple[tuple[int, int, int, bool], ...]
    """(place, first rank, rank after the last, whether the moment of that rank still sees it)."""
    change_ranks: tuple[int, ...]
    """Ranks of `deltas`."""
    change_levels: tuple[int, ...]
    """Private bytes after each of `deltas`."""

    def level(self, rank: int) -> int:
        """Return the private bytes after the moment of a rank."""
        place = bisect_right(self.change_ranks, rank) - 1
        return self.change_levels[place] if place >= 0 else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """One decision for one region, evaluated."""

    region: int
    decision: Decision | None
    shape: Shape
    timeline: Timeline

    @property
    def overhead_ms(self) -> float:
        """What the decision adds to the host's time of the step."""
        return self.shape.overhead_ms

    @cached_property
    def work_ms(self) -> float:
        """What the decision adds to the host's and to the device's time of a pass."""
        return sum(work.host_ms + work.device_ms for _, work in self.shape.work)

    def added_ms(self, cut: Cut) -> float:
        """Return what the decision adds to the way with that cut."""
        found = self._added_ms.get(cut)
        if found is None:
            moments = self.timeline.moments
            found = self._added_ms[cut] = cut.added_ms((moments[rank], work) for rank, work in self.shape.work)
        return found

    @cached_property
    def _added_ms(self) -> dict[Cut, float]:
        return {}

    @cached_property
    def work_arrays(self) -> tuple[Array, Array, Array]:
        """Times of the work that the decision adds, the host's milliseconds, and the device's."""
        moments, work = self.timeline.moments, self.shape.work
        return (
            np.array([moments[rank] for rank, _ in work], dtype=np.int64),
            np.array([stretch.host_ms for _, stretch in work], dtype=np.float64),
            np.array([stretch.device_ms for _, stretch in work], dtype=np.float64),
        )

    @property
    def held_bytes(self) -> int:
        """Bytes that it holds when backward begins, shared ones included: for breaking ties."""
        return self.shape.held_bytes

    @cached_property
    def delta_arrays(self) -> tuple[Array, Array]:
        """Times and private bytes of the changes of level."""
        moments = self.timeline.moments
        return (
            np.array([moments[rank] for rank, _ in self.shape.deltas], dtype=np.int64),
            np.array([nbytes for _, nbytes in self.shape.deltas], dtype=np.float64),
        )

    @cached_property
    def extra_arrays(self) -> tuple[Array, Array]:
        """Times and bytes of the moments in which the column rises, for an instant, above its level after them."""
        moments = self.timeline.moments
        return (
            np.array([moments[rank] for rank in self.shape.extras], dtype=np.int64),
            np.array(list(self.shape.extras.values()), dtype=np.float64),
        )

    @cached_property
    def shared(self) -> tuple[tuple[int, int, int], ...]:
        """(storage, first event, event after the last) of each shared holding."""
        moments, storages = self.timeline.moments, self.timeline.storages
        return tuple(
            (storages[place], moments[first], moments[end] + sees_end)
            for place, first, end, sees_end in self.shape.shared
        )

    def at(self, time: int) -> tuple[int, tuple[int, ...]]:
        """Return the highest private bytes within event `time`, and the shared storages held then."""
        rank, exactly = self.timeline.place(time)
        if rank < 0:
            return 0, ()
        level = self.shape.level(rank)
        if exactly:
            level += self.shape.extras.get(rank, 0)
        if not self.shape.shared:
            return level, ()
        return level, tuple(storage for storage, start, end in self.shared if start <= time < end)


class ColumnSource:
    """Makes and remembers the columns of every region of one profile."""

    def __init__(self, index: ProfileIndex) -> None:
        self.index = index
        self.base = fixed_peaks(index)
        self.holders = _holders(index)
        self.timelines = timelines(index, self.holders)
        self.cuts = TimeCuts(index)
        self._base = np.array(self.base, dtype=np.float64)
        self._columns: list[dict[Decision | None, Column]] = [{} for _ in index.profile.regions]
        self._shapes: dict[tuple[int, Decision | None], Shape] = {}
        self._middle = index.backward_event()
        self.effort = Effort(SEARCH_WORK)
        """Of the search that looks for columns now."""

    def repriced(self, profile: Profile) -> ColumnSource:
        """Return columns of a profile that differs from this one's in nothing but times."""
        other = copy.copy(self)
        other.index = self.index.repriced(profile)
        other.cuts = TimeCuts(other.index)
        other._columns = [{} for _ in profile.regions]
        other._shapes = {}
        other.effort = Effort(SEARCH_WORK)
        return other

    def column(self, region: int, decision: Decision | None) -> Column:
        """Return the column of a decision in a region."""
        found = self._columns[region].get(decision)
        if found is None:
            timeline = self.timelines[region]
            shape = self._shapes.get((timeline.pattern, decision))
            if shape is None:
                shape = self._shapes[timeline.pattern, decision] = self._evaluate(region, decision, timeline)
            found = Column(region=region, decision=decision, shape=shape, timeline=timeline)
            self._columns[region][decision] = found
        return found

    def _evaluate(self, region: int, decision: Decision | None, timeline: Timeline) -> Shape:
        self.effort.spend(self.index.profile.regions[region].op_count)
        curve = region_curve(self.index, region, decision)
        end_of_step = len(self.base)
        rank_of = timeline.ranks.__getitem__  # a region's curve changes only at the region's moments
        deltas = Counter(dict(curve.deltas))
        shared = [hold for hold in curve.holds if len(self.holders[hold[0]]) > 1]
        for storage, start, end in shared:
            nbytes = self.index.profile.storages[storage].nbytes
            deltas[start] -= nbytes
            deltas[end] += nbytes
        deltas.pop(end_of_step, None)
        spikes = dict(curve.spikes)
        changes = [(rank_of(t), delta) for t, delta in sorted(deltas.items()) if delta]
        return Shape(
            overhead_ms=curve.overhead_ms,
            work=tuple((rank_of(time), work) for time, work in curve.added),
            held_bytes=sum(delta for t, delta in curve.deltas if t <= self._middle),
            deltas=tuple(changes),
            extras={rank_of(t): spike - deltas[t] for t, spike in spikes.items()},
            # A storage let go at the event of a spike is still there during the spike.
            shared=tuple((timeline.places[s], rank_of(start), rank_of(end), end in spikes) for s, start, end in shared),
            change_ranks=tuple(rank for rank, _ in changes),
            change_levels=tuple(accumulate(delta for _, delta in changes)),
        )

    def longest_way(self, chosen: Iterable[tuple[Column, float]]) -> tuple[Cut, float]:
        """Return the longest way (see `time_cuts`) for columns with weights, and what it adds to the plain step."""
        return self.cuts.longest([(*column.work_arrays, weight) for column, weight in chosen if column.shape.work])

    def peaks(self, chosen: Iterable[tuple[Column, float]]) -> Array:
        """Return the highest bytes within every event, for columns with weights (fractions in a relaxation)."""
        count = len(self.base)
        times, sizes, extra_times, extra_sizes = [], [], [], []
        holds: dict[int, list[tuple[int, int, int, float]]] = {}
        for column, weight in chosen:
            when, nbytes = column.delta_arrays
            times.append(when)
            sizes.append(nbytes * weight)
            if column.shape.extras:
                when, nbytes = column.extra_arrays
                extra_times.append(when)
                extra_sizes.append(nbytes * weight)
            for storage, start, end in column.shared:
                holds.setdefault(storage, []).append((start, end, column.region, weight))
        changes = _sums(times, sizes, count + 1)
        for storage, intervals in holds.items():
            nbytes_of_storage = self.index.profile.storages[storage].nbytes
            for time, change in _union_changes(intervals):
                changes[time] += change * nbytes_of_storage
        peaks: Array = self._base + np.cumsum(changes[:count]) + _sums(extra_times, extra_sizes, count)
        return peaks


def _sums(times: list[Array], sizes: list[Array], count: int) -> Array:
    """Return the sum of the sizes at each time from 0 to `count` - 1."""
    if not times:
        return np.zeros(count)
    return np.bincount(np.concatenate(times), weights=np.concatenate(sizes), minlength=count)


def _union_changes(intervals: list[tuple[int, int, int, float]]) -> list[tuple[int, float]]:
    """Return how the largest weight that any one region holds changes over time."""
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
    """Return, for each storage, the regions that some decision makes hold it."""
    profile = index.profile
    holders: dict[int, set[int]] = {}
    for facts in index.facts:
        saved = {profile.slots[slot].value for slot in (*facts.slots, *facts.only_again)}
        read = {u for v in facts.droppable for u in profile.ops[profile.values[v].op].inputs}
        if facts.again:
            region = profile.regions[facts.index]
            read |= {u for op in profile.ops[region.first_op :][: region.op_count] for u in op.inputs}
        for value in saved | read:
            if not index.is_free(value):
                holders.setdefault(profile.values[value].storage, set()).add(facts.index)
    return holders


def useful_values(index: ProfileIndex, region: int) -> tuple[int, ...]:
    """Return the values that may be worth keeping: saved, or read by an operation that may be recomputed."""
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


def keeping(index: ProfileIndex, values: Iterable[int]) -> Decision:
    """Return the decision that keeps these values of one region and recomputes the others."""
    return BY_VALUE.decide(frozenset(index.local(value) for value in values))
