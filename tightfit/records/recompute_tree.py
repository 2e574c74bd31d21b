"""Divide a long tape for recursive recomputation: leaves, and a tree over them.

Replay without it rebuilds, at the first read, everything that its region still needs, and holds it.  Over a long chain
that is as much as the plain step holds.  So the tape's operations are divided into *leaves* with a tree over them, as
treeverse does (Griewank & Walther 2000): while backward is in one leaf, replay holds only

* values that are used inside that leaf, and
* values that pass from one leaf to another inside a subtree that the leaf belongs to: the inputs of its neighbours.

Everything else that a replay passes through is dropped again at once and replayed again when backward gets there.  With
leaves in groups of about the square root of their number, O(sqrt n) of the passing values are held at a time and each
operation runs at most once more (Chen 2016); with a binary tree, O(log n) are held and each runs up to log2(n) times.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeTree:
    """Leaves of a tape that covers one or more consecutive regions, and the tree over them."""

    cuts: tuple[tuple[int, int], ...] = ()
    """(region's place among the tape's, operation's position in it): where the second, third, ... leaf begins."""
    depths: tuple[int, ...] = ()
    """For each cut, the depth of the smallest subtree that holds the leaves on both its sides; the root's is 0."""

    @property
    def leaf_count(self) -> int:
        """Number of leaves."""
        return len(self.cuts) + 1

    def leaf_at(self, region: int, position: int) -> int:
        """Return the leaf of the operation at `position` of the tape's `region`-th region."""
        return bisect_right(self.cuts, (region, position))

    def holds(self, first: int, last: int, leaf: int) -> bool:
        """Return whether replay for `leaf` holds a value that is made in leaf `first` and used up to leaf `last`.

        It does if the smallest subtree around those two contains `leaf`.
        """
        if first <= leaf <= last:
            return True
        if first == last:
            return False
        depth = min(self.depths[first:last])
        between = self.depths[leaf:first] if leaf < first else self.depths[last:leaf]
        return min(between) >= depth


def balanced_tree(cuts: Sequence[tuple[int, int]], at_top: Sequence[bool], arity: int) -> RecomputeTree:
    """Return a tree whose root is divided at the cuts that are `at_top`, and each part of it by a balanced tree.

    Args:
        cuts: where leaves begin, in order.
        at_top: for each cut, whether it divides the root.
        arity: children of each inner node below the root (where there are as many leaves); at least 2.
    """
    depths = [0] * len(cuts)
    ends = [place for place, top in enumerate(at_top) if top]
    starts = [0, *(place + 1 for place in ends)]
    spans = [(first, last, 1) for first, last in zip(starts, [*ends, len(cuts)], strict=True)]
    while spans:  # leaves first..last under one node; cut i lies between leaf i and the next
        first, last, depth = spans.pop()
        leaves = last - first + 1
        children = min(arity, leaves)
        bounds = [first + leaves * child // children for child in range(children + 1)]
        for start, end in pairwise(bounds):
            if end <= last:
                depths[end - 1] = depth
            if end - start > 1 and children > 1:
                spans.append((start, end - 1, depth + 1))
    return RecomputeTree(cuts=tuple(cuts), depths=tuple(depths))
