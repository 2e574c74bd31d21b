"""What all levers write into a recipe alike."""

from __future__ import annotations

from collections.abc import Iterable

from tightfit.simulation.profile_index import ProfileIndex


def op_names_of(index: ProfileIndex, region: int) -> tuple[str, ...]:
    """Return the names of a region's operations."""
    profile = index.profile
    record = profile.regions[region]
    ops = profile.ops[record.first_op : record.first_op + record.op_count]
    return tuple(profile.signatures[op.signature].name for op in ops)


def replay_ms_of(index: ProfileIndex, ops: Iterable[int]) -> float:
    """Return the time of operations, each run once: the longer of the host's and the device's.

    Rounded to a picosecond, so that plans of equal operations in another order are equally fast.
    """
    profile = index.profile
    return round(sum(profile.signatures[profile.ops[op].signature].slower_ms for op in ops), 9)
