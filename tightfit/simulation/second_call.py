"""What a second call of a region's module would make again, as far as the recorded operations tell.

A tape follows values; a second call repeats everything, also what the dispatcher does not see.  So here storages count:
all that appears during the first call is made again by the second.
"""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.records import Event, EventKind, Profile, Region


def made_storages(window: Sequence[Event]) -> frozenset[int]:
    """Return the storages that appear between a region's begin and end."""
    return frozenset(a for kind, a in window if kind == EventKind.ALLOC)


def slots_made_again(
    profile: Profile,
    region: Region,
    saved: Sequence[int],
    made: frozenset[int],
    values_of_storage: Sequence[Sequence[int]],
) -> frozenset[int]:
    """Return the slots whose saved tensors a second call makes again; none if it would not be the same computation.

    It finds what the first one found, and may change nothing but buffers, which are put back.

    Args:
        profile: the profile.
        region: the region, one call of its module.
        saved: the slots that were saved in it.
        made: as `made_storages`.
        values_of_storage: the values of each storage, in order.
    """
    if not region.module_recomputable:
        return frozenset()
    first, end = region.first_op, region.first_op + region.op_count
    ops = profile.ops[first:end]
    values, storages = profile.values, profile.storages
    moved: set[int] = set()
    for op in ops:
        for value in op.mutates:
            storage = values[value].storage
            if storage not in made:
                if storages[storage].component != "buffers":
                    return frozenset()
                moved.add(value)
    for op in ops:
        for value in op.inputs:
            record = values[value]
            if record.storage not in made and record.overwritten and value not in moved:
                return frozenset()
    again = frozenset(slot for slot in saved if values[profile.slots[slot].value].storage in made)
    # A write after the region's end is one that plain autograd would see, or refuse. Values are in order of time.
    last = max((value for op in ops for value in op.outputs), default=-1)
    for storage in {values[profile.slots[slot].value].storage for slot in again}:
        for value in values_of_storage[storage]:
            if value > last:
                return frozenset()
    return again
