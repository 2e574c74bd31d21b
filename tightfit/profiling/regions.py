"""Which modules become regions.

A region should be a repeated block: large enough that replay inside it pays, small enough that what its backward holds
at once stays small, and repeated so that one solve serves many.  The rule looks only at the calls that were observed,
never at names or classes of particular libraries:

* a call at least half of whose operations lie in repeated direct child calls (two or more of one class, each with at
  least `_FEWEST_OPS` operations) is a container: its children are looked at instead;
* so is a call around such a container, if it is not itself repeated: a model that calls its encoder of many layers;
* so is a call with more than `_MOST_OPS` operations that has children worth being a region;
* any other call with at least `_FEWEST_OPS` operations is a region.

The model itself is always one: its own operations between regions are its segments.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tightfit.operators.region_names import ROOT
from tightfit.profiling.observation import ModuleEvent, Observation
from tightfit.records import Event, EventKind

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


def _choose(call: _Call, class_of: dict[str, str], chosen: set[str], *, repeated: bool = False) -> None:
    worthwhile = _worthwhile(call)
    if worthwhile and (_is_container(call, class_of, look_inside=not repeated) or call.ops > _MOST_OPS):
        kinds = _kinds(worthwhile, class_of)
        for child in worthwhile:
            _choose(child, class_of, chosen, repeated=kinds[class_of.get(child.path, "")] >= 2)
    elif call.ops >= _FEWEST_OPS:
        chosen.add(call.path)


def _is_container(call: _Call, class_of: dict[str, str], *, look_inside: bool) -> bool:
    worthwhile = _worthwhile(call)
    kinds = _kinds(worthwhile, class_of)
    repeated_ops = sum(child.ops for child in worthwhile if kinds[class_of.get(child.path, "")] >= 2)
    if worthwhile and 2 * repeated_ops >= call.ops:
        return True
    return look_inside and any(
        2 * child.ops >= call.ops and _is_container(child, class_of, look_inside=True) for child in worthwhile
    )


def _worthwhile(call: _Call) -> list[_Call]:
    return [child for child in call.children if child.ops >= _FEWEST_OPS]


def _kinds(calls: list[_Call], class_of: dict[str, str]) -> Counter[str]:
    return Counter(class_of.get(call.path, "") for call in calls)
