"""Mark what belongs to excluded modules, so that no plan recomputes it."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.profiling.observation import ModuleEvent, Observation
from tightfit.records import EventKind
from tightfit.step.exclude import is_inside

_INSIDE = "it runs inside an excluded module"
_SAVED_INSIDE = "an excluded module saves its result"


def keep_excluded(observation: Observation, excluded: Sequence[str]) -> None:
    """Have kept what operations inside the excluded modules make, and what autograd saves there."""
    if not excluded:
        return
    ops = observation.ops
    inside: list[bool] = []  # of the module calls that are open
    slot = 0
    for event in observation.events:
        if isinstance(event, ModuleEvent):
            if event.path is None:
                inside.pop()
            else:
                inside.append(bool(inside and inside[-1]) or is_inside(event.path, excluded))
            continue
        if event.kind == EventKind.BACKWARD:
            return
        here = bool(inside and inside[-1])
        if event.kind == EventKind.OP and here:
            ops[event.a].keep_reason = ops[event.a].keep_reason or _INSIDE
        elif event.kind == EventKind.SAVE:
            maker = observation.values[observation.slots[slot]].op
            slot += 1
            if here and maker >= 0:
                ops[maker].keep_reason = ops[maker].keep_reason or _SAVED_INSIDE
