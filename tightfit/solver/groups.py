"""Regions that the rows of the master problem cannot tell apart, and the columns among which each of them chooses."""

from __future__ import annotations

from dataclasses import dataclass
from operator import le

from tightfit.solver.columns import Column

#: Bytes at each of the master's moments.
Levels = tuple[int, ...]
#: (place of the moment, storage) of shared storages held.
Links = frozenset[tuple[int, int]]
NO_LINKS: Links = frozenset()


@dataclass(frozen=True, slots=True)
class Group:
    """Regions that the rows cannot tell apart, and the columns among which each of them chooses."""

    regions: list[int]
    columns: list[Column]
    """Of the first region; those of the others have the same decisions."""
    levels: list[Levels]
    """For each column, the bytes at each moment, a shared storage included if no other region may hold it then."""
    linked: list[Links]
    """For each column, the shared storages that others may hold too, at the moments that have any."""
    times: list[tuple[float, ...]]
    """For each column, what it adds to each way."""


def undominated(group: Group) -> Group:
    """Leave out the columns that another one equals or beats in time, in every row and in what it shares."""
    order = sorted(range(len(group.columns)), key=lambda place: group.times[place])
    kept: list[int] = []
    for place in order:
        levels, linked, times = group.levels[place], group.linked[place], group.times[place]
        if not any(
            all(map(le, group.levels[other], levels))
            and group.linked[other] <= linked
            and all(map(le, group.times[other], times))
            for other in kept
        ):
            kept.append(place)
    return Group(
        group.regions,
        [group.columns[place] for place in kept],
        [group.levels[place] for place in kept],
        [group.linked[place] for place in kept],
        [group.times[place] for place in kept],
    )
