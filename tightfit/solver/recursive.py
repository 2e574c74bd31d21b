"""Plan recursive recomputation: one tape over the whole forward, divided by a tree.

Where each region is dropped once, whatever passes from region to region is held from forward to backward, so memory
grows with depth.  Here all regions share one tape; it is cut into leaves of about equal saved bytes, at the places
where the fewest bytes pass.  A candidate holds what passes at every k-th cut and lets replay pass through the rest,
under a flat tree (Chen et al. 2016: about the square root of the depth) or a deeper one (treeverse, Griewank & Walther
2000: its logarithm).

The candidates are a family, not an optimum: every one is walked by `simulate`, and the fastest that fits is taken, so
that time never increases with the budget.  Their shape depends on sizes alone, not on measured times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tightfit.records import Decision, SharedTape
from tightfit.records.recompute_tree import RecomputeTree, balanced_tree
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import Simulation, simulate

#: Leaves at most, unless there are more regions.
_MOST_LEAVES = 256
#: Children of each inner node, where there are more leaves than that.
_ARITIES = (2, 4)
#: Leaves side by side under one node of a flat tree, at most.
_WIDEST = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class RecursivePlan:
    """One candidate, walked."""

    decisions: list[Decision | None]
    shared_tapes: tuple[SharedTape, ...]
    simulation: Simulation


class RecursivePlans:
    """The family of one profile."""

    def __init__(self, index: ProfileIndex) -> None:
        self._index = index
        profile = index.profile
        self._facts = index.tape_facts(0, len(profile.regions))
        self._last_use = self._last_uses()
        #: Before each operation: bytes that pass from what ran before it to what runs from it on.
        self._passing_bytes = self._crossings()
        #: Bytes of droppable saved tensors that each operation makes.
        saved = {profile.slots[slot].value for slot in self._facts.slots}
        self._saved_bytes = [
            sum(index.nbytes(value) for value in op.outputs if value in saved and not index.is_free(value))
            for op in profile.ops
        ]

    def all(self) -> Iterator[RecursivePlan]:
        """Yield every candidate, each walked when it is asked for."""
        seen: set[tuple[int, ...]] = set()
        for leaf_count in self._leaf_counts():
            cuts = self._cut(leaf_count)
            if tuple(cuts) not in seen and cuts:
                seen.add(tuple(cuts))
                yield from self._with_cuts(cuts)

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

    def _with_cuts(self, cuts: Sequence[int]) -> Iterator[RecursivePlan]:
        leaf_count = len(cuts) + 1
        spacing = 1
        while True:
            held = list(cuts[spacing - 1 :: spacing]) if spacing < leaf_count else []
            if spacing <= _WIDEST:
                yield self._walk(cuts, held, leaf_count)
            for arity in _ARITIES:
                if spacing >= arity**2:
                    yield self._walk(cuts, held, arity)
            if spacing >= leaf_count:
                return
            spacing *= 2

    def _walk(self, cuts: Sequence[int], held: Sequence[int], arity: int) -> RecursivePlan:
        """Return the plan that holds what passes at the cuts in `held`, with a tree of this arity between them."""
        index, profile = self._index, self._index.profile
        keep: list[set[tuple[int, int]]] = [set() for _ in profile.regions]
        for value in self._facts.optional:
            op = profile.values[value].op
            if any(op < cut <= self._last_use.get(value, -1) for cut in held):
                keep[index.region_of_op[op]].add(index.local(value))
        decisions: list[Decision | None] = [BY_VALUE.decide(names) for names in keep]
        shared = SharedTape(first=0, count=len(decisions), tree=self._tree(cuts, set(held), arity))
        walked = simulate(index, decisions, (shared,))
        return RecursivePlan(decisions=decisions, shared_tapes=(shared,), simulation=walked)

    def _tree(self, cuts: Sequence[int], held: set[int], arity: int) -> RecomputeTree:
        places = []
        for cut in cuts:
            region = self._index.region_of_op[cut]
            places.append((region, cut - self._index.profile.regions[region].first_op))
        return balanced_tree(places, [cut in held for cut in cuts], arity)

    def _last_uses(self) -> dict[int, int]:
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

    def _crossings(self) -> list[int]:
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
