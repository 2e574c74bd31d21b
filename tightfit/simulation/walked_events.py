"""The events of a step as a walk needs them: those that decisions are about, and what lies between them summed up.

Most of what a step allocates, above all in backward, no decision holds: it lives as long in every plan.  So between two
events at which a region may do something, memory rises and falls by the same bytes whatever is decided, and only its
highest level there can be the step's peak.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from tightfit.records import EventKind, Profile


class WalkedEvent(NamedTuple):
    """One event, or several that follow each other and are the same under every plan."""

    time: int
    """Index into `Profile.events`; of several, that of the first highest one; -1 if they only free memory."""
    kind: EventKind | None
    """None: they are the same under every plan."""
    a: int
    """As `Event.a`; of such events, the highest level within them, in bytes beyond that before them."""
    owner: int = -1
    """The region that has a part in it."""
    storage: int = -1
    """What a saved tensor's event holds, or lets go of, unless its region's decision is about it."""
    workspace_bytes: int = 0
    """What the operation takes for itself."""
    change_bytes: int = 0
    """Of events that are the same under every plan: by how much the level is higher after them."""


_OF_SLOTS = (EventKind.SAVE, EventKind.UNPACK, EventKind.READ, EventKind.RELEASE)
_NOTHING_YET = WalkedEvent(-1, None, 0)


def walked_events(
    profile: Profile, region_of_op: Sequence[int], fixed_slots: Collection[int], *, summed_up: bool = True
) -> Sequence[WalkedEvent]:
    """Return a step's events.

    A decision holds nothing but what forward saves, and what its operations read.

    Args:
        profile: the step.
        region_of_op: the region of each of its operations.
        fixed_slots: saved tensors that no decision for a single region is about.
        summed_up: with one for all that follow each other and are the same under every plan.
    """
    records, signatures = profile.values, profile.signatures
    nbytes_of = [one.nbytes if one.component == "activation" else 0 for one in profile.storages]
    held_by_some = {records[slot.value].storage for slot in profile.slots}
    held_by_some |= {records[value].storage for op in profile.ops for value in op.inputs}
    held = [0] * len(nbytes_of)
    found: list[WalkedEvent] = []
    for time, (kind, a) in enumerate(profile.events):
        if kind == EventKind.OP:
            workspace_bytes = signatures[profile.ops[a].signature].workspace_bytes
            found.append(WalkedEvent(time, kind, a, region_of_op[a], workspace_bytes=workspace_bytes))
        elif kind == EventKind.EXIT:
            found.append(WalkedEvent(time, kind, a, a))
        elif kind in _OF_SLOTS:
            slot = profile.slots[a]
            is_fixed = a in fixed_slots and kind in (EventKind.SAVE, EventKind.RELEASE)
            found.append(WalkedEvent(time, kind, a, slot.region, records[slot.value].storage if is_fixed else -1))
        elif kind != EventKind.OTHER_OP and (kind not in (EventKind.ALLOC, EventKind.FREE) or a in held_by_some):
            found.append(WalkedEvent(time, kind, a))
        else:
            before = found.pop() if summed_up and found and found[-1].kind is None else _NOTHING_YET
            highest_at, highest_bytes, workspace_bytes = before.time, before.a, before.workspace_bytes
            level, takes_bytes = before.change_bytes, 0
            if kind == EventKind.ALLOC:
                held[a] += 1
                level += nbytes_of[a] if held[a] == 1 else 0
            elif kind == EventKind.FREE:
                held[a] -= 1
                level -= nbytes_of[a] if held[a] == 0 else 0
            else:
                takes_bytes = signatures[a].workspace_bytes
            if kind != EventKind.FREE and (highest_at < 0 or level + takes_bytes > highest_bytes):
                highest_at, highest_bytes, workspace_bytes = time, level + takes_bytes, takes_bytes
            found.append(
                WalkedEvent(highest_at, None, highest_bytes, workspace_bytes=workspace_bytes, change_bytes=level)
            )
    return found
