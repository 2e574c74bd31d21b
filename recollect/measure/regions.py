"""Which modules become regions.

A region should be a repeated block: large enough that replay inside it pays, small enough that what its backward holds
at once stays small, and repeated so that one solve serves many.  The rule looks only at the calls that were observed,
never at names or classes of particular libraries:

* a call at least half of whose operations lie in repeated direct child calls (two or more of one class, each with at
  least `_FEWEST_OPS` operations) is a container: its children are looked at instead;
* so is a call with more than `_MOST_OPS` operations that has children worth being a region;
* any other call with at least `_FEWEST_OPS` operations is a region.

The model itself is always one: its own operations between regions are its segments.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from recollect.measure.observer import ModuleEvent, Observation
from recollect.records import Event, EventKind
from recollect.replay.cursor import ROOT

_FEWEST_OPS = 4
_MOST_OPS = 120


@dataclass(slots=True)
class _Call:
    path: str
    ops: int = 0  # of the call and all below
    children: list[_Call] = field(default_factory=list)


def choose_regions(observation: Observation, class_of: dict[str, str]) -> tuple[str, ...]:
    """Paths of the region modules, the model's own (`<model>`) first.  `class_of` names each path's module class."""
    chosen: set[str] = set()
    for call in _calls(observation):
        _choose(call, class_of, chosen)
    chosen.discard(ROOT)
    return (ROOT, *sorted(chosen))


def _calls(observation: Observation) -> list[_Call]:
    top: list[_Call] = []
    stack: list[_Call] = []
    for event in observation.events:
        if isinstance(event, ModuleEvent):
            if event.path is not None:
                call = _Call(event.path)
                (stack[-1].children if stack else top).append(call)
                stack.append(call)
            else:
                ended = stack.pop()
                if stack:
                    stack[-1].ops += ended.ops
        elif isinstance(event, Event) and event.kind == EventKind.OP and stack:
            stack[-1].ops += 1
    return top


def _choose(call: _Call, class_of: dict[str, str], chosen: set[str]) -> None:
    worthwhile = [child for child in call.children if child.ops >= _FEWEST_OPS]
    kinds = Counter(class_of.get(child.path, "") for child in worthwhile)
    repeated_ops = sum(child.ops for child in worthwhile if kinds[class_of.get(child.path, "")] >= 2)
    repeats = 2 * repeated_ops >= call.ops
    if worthwhile and (repeats or call.ops > _MOST_OPS):
        for child in worthwhile:
            _choose(child, class_of, chosen)
    elif call.ops >= _FEWEST_OPS:
        chosen.add(call.path)
