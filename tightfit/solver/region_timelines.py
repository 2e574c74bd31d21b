"""Tell which regions' parts of the timeline look the same: one evaluation of a decision serves all of them.

Two regions of one class do the same operations, but what happens to them in backward, and which of their storages live
anyway, depends on their neighbours.  A *pattern* is all of that, with times replaced by ranks among the region's own
*moments* (its events, and the births and deaths of the storages that it touches) and storages by their order of first
appearance.  Regions of one pattern have the same `region_curve` but for the translation of ranks and storages, which
makes a chain of a thousand identical blocks cost as much as one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

from tightfit.records import EventKind
from tightfit.simulation.profile_index import ProfileIndex


@dataclass(frozen=True)
class Timeline:
    """One region's part of the step."""

    pattern: int
    moments: tuple[int, ...]
    """Events that matter to the region, in order; a rank is an index into it."""
    storages: tuple[int, ...]
    """Storages that its tape touches, by first appearance."""

    @cached_property
    def ranks(self) -> Mapping[int, int]:
        """Rank of each moment."""
        return {time: rank for rank, time in enumerate(self.moments)}

    @cached_property
    def places(self) -> Mapping[int, int]:
        """Place of each storage."""
        return {storage: place for place, storage in enumerate(self.storages)}

    def place(self, time: int) -> tuple[int, bool]:
        """Return the rank of the last moment up to event `time` (-1: none), and whether it is that very event."""
        rank = bisect_right(self.moments, time) - 1
        return rank, rank >= 0 and self.moments[rank] == time


def timelines(index: ProfileIndex, holders: dict[int, set[int]]) -> list[Timeline]:
    """Return every region's timeline. `holders`: for each storage, the regions that some decision makes hold it."""
    numbers: dict[Hashable, int] = {}
    return [_timeline(index, holders, region, numbers) for region in range(len(index.profile.regions))]


def _timeline(index: ProfileIndex, holders: dict[int, set[int]], region: int, numbers: dict[Hashable, int]) -> Timeline:
    profile = index.profile
    record = profile.regions[region]
    slots = index.slots_of_region[region]
    touched = [
        profile.values[value].storage
        for op in profile.ops[record.first_op : record.first_op + record.op_count]
        for value in (*op.inputs, *op.outputs)
    ]
    touched += [profile.values[profile.slots[slot].value].storage for slot in slots]
    places: dict[int, int] = {}
    # Which of them each operation and each save touches: where values come from is not part of a class.
    wiring = tuple(places.setdefault(storage, len(places)) for storage in touched)
    slot_places = {slot: place for place, slot in enumerate(slots)}
    happenings: dict[int, list[tuple[str | int, int]]] = {}
    for time in index.events_of_region[region]:
        kind, a = profile.events[time]
        if kind == EventKind.OP:
            a -= record.first_op
        elif kind not in (EventKind.EXIT, EventKind.KEEPING):
            a = slot_places[a]
        elif kind == EventKind.EXIT:
            a = 0
        happenings.setdefault(time, []).append((int(kind), a))
    traits = []
    for storage, place in places.items():
        # An input may be a view of a larger storage, which a class does not tell.
        nbytes = profile.storages[storage].nbytes
        traits.append((index.is_resident(storage), nbytes, len(holders.get(storage, ())) > 1))
        for time in index.fixed_births(storage):
            happenings.setdefault(time, []).append(("birth", place))
        for time in index.fixed_deaths(storage):
            happenings.setdefault(time, []).append(("death", place))
    happenings.setdefault(len(profile.events), []).append(("end", 0))  # what is never let go of
    moments = sorted(happenings)
    middle = index.backward_event()
    key = (
        record.class_id,
        wiring,
        tuple(traits),
        tuple((time <= middle, tuple(happenings[time])) for time in moments),
    )
    return Timeline(numbers.setdefault(key, len(numbers)), tuple(moments), tuple(places))


def neighbourhoods(index: ProfileIndex) -> list[int]:
    """Return, for each event, a number for its neighbourhood: which region runs, forward or backward."""
    owner = {time: region for region, times in enumerate(index.events_of_region) for time in times}
    middle = index.backward_event()
    numbers = []
    current = 0
    for time in range(len(index.profile.events)):
        if time in owner:
            current = 2 * owner[time] + (time >= middle)
        numbers.append(current)
    return numbers
