"""Plan recursive recomputation: one tape over the whole forward, divided by a tree.

Where each region is dropped once, whatever passes from region to region is held from forward to backward, so memory
grows with depth.  Here all regions share one tape; it is cut into leaves of about equal saved bytes, at the places
where the fewest bytes pass.  A candidate holds what passes at every k-th cut and lets replay pass through the rest,
under a flat tree (Chen et al. 2016: about the square root of the depth) or a deeper one (treeverse, Griewank & Walther
2000: its logarithm).

The candidates are a family, not an optimum: those that may fit are walked by `simulate`, and the fastest that does is
taken, so that time never increases with the budget.  Their shape depends on sizes alone, not on measured times.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from tightfit.collector import uncollected
from tightfit.records import Decision, EventKind, SharedTape
from tightfit.records.recompute_tree import RecomputeTree, balanced_tree
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex, RegionFacts
from tightfit.simulation.simulator import INFINITY, Simulation, TooHigh, simulate

#: Leaves at most, unless there are more regions.
_MOST_LEAVES = 256
#: Children of each inner node, where there are more leaves than that.
_ARITIES = (2, 4)
#: Leaves side by side under one node of a flat tree, at most.
_WIDEST = 24

#: Walks of a candidate that end where the peak is above what was asked for, before one to the step's end.
_GIVEN_UP_AT_MOST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RecursivePlan:
    """One candidate, walked."""

    decisions: list[Decision | None]
    shared_tapes: tuple[SharedTape, ...]
    simulation: Simulation


class _Candidate:
    """One way to divide the tape, and what is known of it; walked only as far as somebody asks."""

    def __init__(
        self, decisions: list[Decision | None], shared_tapes: tuple[SharedTape, ...], least_bytes: int
    ) -> None:
        self._decisions = decisions
        self._shared_tapes = shared_tapes
        self.least_bytes = least_bytes
        """Its peak is not below that."""
        self._given_up = 0
        self._walked: RecursivePlan | None = None

    def within(self, index: ProfileIndex, most_bytes: float) -> RecursivePlan | None:
        """Return it with its walk; None if its peak is above that."""
        if self._walked is None and self.least_bytes <= most_bytes:
            # Asked for again and again, as for a frontier, it is walked to its end.
            limit = most_bytes if self._given_up < _GIVEN_UP_AT_MOST else INFINITY
            try:
                walked = simulate(index, self._decisions, self._shared_tapes, most_bytes=limit)
            except TooHigh:
                self.least_bytes = math.floor(most_bytes) + 1
                self._given_up += 1
                return None
            self.least_bytes = walked.peak_bytes
            self._walked = RecursivePlan(decisions=self._decisions, shared_tapes=self._shared_tapes, simulation=walked)
        return self._walked if self.least_bytes <= most_bytes else None


class RecursivePlans:
    """The family of one profile."""

    def __init__(self, index: ProfileIndex, least_step_ms: float = 0.0) -> None:
        """Describe the family; candidates whose step takes less than `least_step_ms` are left out of it."""
        self._index = index
        self._least_step_ms = least_step_ms

    @uncollected()
    def within(self, most_bytes: float) -> list[RecursivePlan]:
        """Return every candidate whose peak is not above that."""
        walked = [candidate.within(self._index, most_bytes) for candidate in self._candidates]
        return [one for one in walked if one is not None and one.simulation.step_ms >= self._least_step_ms]

    @uncollected()
    def smallest(self, most_bytes: float) -> RecursivePlan | None:
        """Return the candidate with the smallest peak, the first of several; None if all are above `most_bytes`."""
        best: tuple[int, int] | None = None
        found: RecursivePlan | None = None
        # Those that hold least first: after them, most are out of it before they are walked, or soon afterwards.
        for number, candidate in sorted(enumerate(self._candidates), key=lambda one: one[1].least_bytes):
            walked = candidate.within(self._index, most_bytes)
            if walked is None or walked.simulation.step_ms < self._least_step_ms:
                continue
            if best is None or (walked.simulation.peak_bytes, number) < best:
                best, found = (walked.simulation.peak_bytes, number), walked
                most_bytes = walked.simulation.peak_bytes
        return found

    @cached_property
    def _candidates(self) -> list[_Candidate]:
        index = self._index
        if index.profile.is_sharded or not any(facts.slots for facts in index.facts):
            return []
        if index.has_backward_inside:  # it would read a tape that is not ended
            return []
        seen: set[tuple[int, ...]] = set()
        found: list[_Candidate] = []
        for leaf_count in self._leaf_counts():
            cuts = self._cut(leaf_count)
            if tuple(cuts) not in seen and cuts:
                seen.add(tuple(cuts))
                found += self._with_cuts(cuts)
        return found

    @cached_property
    def _facts(self) -> RegionFacts:
        return self._index.tape_facts(0, len(self._index.profile.regions))

    @cached_property
    def _saved_bytes(self) -> list[int]:
        """Bytes of droppable saved tensors that each operation makes."""
        index, profile = self._index, self._index.profile
        saved = {profile.slots[slot].value for slot in self._facts.slots}
        return [
            sum(index.nbytes(value) for value in op.outputs if value in saved and not index.is_free(value))
            for op in profile.ops
        ]

    def _leaf_counts(self) -> list[int]:
        """Return the number of regions that save something, its halves and its doubles."""
        profile = self._index.profile
        with_saved = {self._index.region_of_op[op] for op, nbytes in enumerate(self._saved_bytes) if nbytes}
        count = max(1, len(with_saved))
        counts = {count}
        while 2 * min(counts) ** 2 > count and min(counts) > 2:  # fewer than the root of it: leaves too large to pay
            counts.add(min(counts) // 2)
        while 2 * max(counts) <= min(_MOST_LEAVES, len(profile.ops)):
            counts.add(2 * max(counts))
        return sorted(counts - {1})

    def _with_cuts(self, cuts: Sequence[int]) -> Iterator[_Candidate]:
        leaf_count = len(cuts) + 1
        spacing = 1
        while True:
            held = list(cuts[spacing - 1 :: spacing]) if spacing < leaf_count else []
            if spacing <= _WIDEST:
                yield self._candidate(cuts, held, leaf_count)
            for arity in _ARITIES:
                if spacing >= arity**2:
                    yield self._candidate(cuts, held, arity)
            if spacing >= leaf_count:
                return
            spacing *= 2

    def _candidate(self, cuts: Sequence[int], held: Sequence[int], arity: int) -> _Candidate:
        """Return the plan that holds what passes at the cuts in `held`, with a tree of this arity between them."""
        index, profile = self._index, self._index.profile
        keep: list[set[tuple[int, int]]] = [set() for _ in profile.regions]
        least_bytes, saved = self._when_backward_begins
        storages: set[int] = set()
        for value in self._facts.optional:
            op = profile.values[value].op
            place = bisect_right(held, op)
            if place < len(held) and held[place] <= self._last_use.get(value, -1):
                keep[index.region_of_op[op]].add(index.local(value))
                if value in saved:
                    storages.add(saved[value])
        decisions: list[Decision | None] = [BY_VALUE.decide(names) for names in keep]
        shared = SharedTape(first=0, count=len(decisions), tree=self._tree(cuts, set(held), arity))
        least_bytes += sum(index.activation_bytes[storage] for storage in storages)
        return _Candidate(decisions, (shared,), least_bytes)

    def _tree(self, cuts: Sequence[int], held: set[int], arity: int) -> RecomputeTree:
        places = []
        for cut in cuts:
            region = self._index.region_of_op[cut]
            places.append((region, cut - self._index.profile.regions[region].first_op))
        return balanced_tree(places, [cut in held for cut in cuts], arity)

    @cached_property
    def _when_backward_begins(self) -> tuple[int, dict[int, int]]:
        """Return what every candidate holds at the moment when backward begins, in bytes, and each saved value that it
        holds then if it keeps it, with its storage, unless that is there anyway.
        """
        index, profile = self._index, self._index.profile
        tape = frozenset(self._facts.slots)
        held: Counter[int] = Counter()  # storages
        saved: set[int] = set()
        for kind, a in profile.events[: index.backward_event()]:
            if kind in (EventKind.ALLOC, EventKind.FREE):
                held[a] += 1 if kind == EventKind.ALLOC else -1
            elif kind in (EventKind.SAVE, EventKind.RELEASE):
                sign = 1 if kind == EventKind.SAVE else -1
                if a in index.fixed_slots and a not in tape:
                    held[profile.values[profile.slots[a].value].storage] += sign
                elif a in tape:
                    (saved.add if sign > 0 else saved.discard)(a)
        there = {storage for storage, times in held.items() if times > 0}
        values = [profile.slots[slot].value for slot in saved]
        optional = {value: storage for value in values if (storage := profile.values[value].storage) not in there}
        resident = profile.baseline_bytes + profile.correction_bytes + profile.margin_bytes
        return resident + sum(index.activation_bytes[storage] for storage in there), optional

    @cached_property
    def _last_use(self) -> dict[int, int]:
        """Return, for each value of forward, the last operation that reads it or before which it is saved."""
        profile = self._index.profile
        last: dict[int, int] = {}
        for op, record in enumerate(profile.ops):
            for value in record.inputs:
                last[value] = op
        for slot in self._facts.slots:
            region = profile.regions[profile.slots[slot].region]
            value = profile.slots[slot].value
            # Somewhere in its region: at its first operation, if it was made before.
            last[value] = max(last.get(value, -1), min(region.first_op, len(profile.ops) - 1))
        return last

    @cached_property
    def _passing_bytes(self) -> list[int]:
        """Before each operation: bytes that pass from what ran before it to what runs from it on."""
        index, profile = self._index, self._index.profile
        changes = [0] * (len(profile.ops) + 1)
        for value, last in self._last_use.items():
            op = profile.values[value].op
            if 0 <= op < last and value in self._facts.optional and not index.is_free(value):
                changes[op + 1] += index.nbytes(value)
                changes[last + 1] -= index.nbytes(value)
        return list(accumulate(changes[:-1]))

    def _cut(self, leaf_count: int) -> list[int]:
        """Return the operations at which leaves begin: as many as asked for or fewer.

        Leaves are of about equal saved bytes; each cut is moved to where the fewest bytes pass.
        """
        totals = [0, *accumulate(self._saved_bytes)]
        if totals[-1] == 0:
            return []
        ops = range(1, len(self._saved_bytes))
        share = totals[-1] / leaf_count
        # Every operation belongs to the window around the ideal cut that is nearest by saved bytes.
        windows: dict[int, list[int]] = {}
        for op in ops:
            windows.setdefault(round(totals[op] / share), []).append(op)
        starts = {region.first_op for region in self._index.profile.regions}
        cuts = []
        for number, window in windows.items():
            if 0 < number < leaf_count:
                ideal = number * share
                cuts.append(
                    min(window, key=lambda op: (self._passing_bytes[op], op not in starts, abs(totals[op] - ideal)))
                )
        return [cut for before, cut in pairwise([0, *cuts]) if totals[cut] > totals[before]]
