"""Choose the modules that become regions.

A region should be a repeated block: large enough that replay inside it pays, small enough that its backward holds
little at once, and repeated so that one solve serves many.  The rule looks only at the observed calls, never at names
or classes of particular libraries:

* A call is a container, and its children are examined instead, if at least half of its ops lie in repeated direct child
  calls (two or more of one class, each with at least `_MIN_OPS` ops).
* So is a call around such a container, if it is not repeated itself: a model that calls its encoder of many layers.
* So is a call with more than `_MAX_OPS` ops that has children with at least `_MIN_OPS`.
* Any other call with at least `_MIN_OPS` ops is a region.

A function that the model itself checkpoints is a call like any other, where it is not all of a module's forward, nor a
single module's call: then the module stands for both.

A module that is to be left untouched is no region, and neither is any module inside it.

The model itself, or each of several, is always a region: its own ops between other regions are its segments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tightfit.operators.region_names import CHECKPOINT, ROOT, is_module_below
from tightfit.profiling.observation import ModuleEvent, Observation
from tightfit.records import Event, EventKind
from tightfit.step.exclude import is_inside

_MIN_OPS = 4
_MAX_OPS = 120


@dataclass(slots=True)
class _Call:
    path: str
    ops: int = 0  # those of calls inside included
    children: list[_Call] = field(default_factory=list)


def choose_regions(
    observation: Observation, class_of: dict[str, str], excluded: Sequence[str] = (), models: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the paths of the modules that become regions, the model's own (`<model>`) first.

    Args:
        observation: what was recorded of a step.
        class_of: the name of the module's class, by path.
        excluded: paths of the modules that are to be left untouched.
        models: paths of the models of a step that has several.
    """
    chosen: set[str] = set()
    for call in _calls(observation):
        if call.path in models:
            chosen.add(call.path)
        _choose(call, class_of, chosen)
    chosen.discard(ROOT)
    return (ROOT, *sorted(path for path in chosen if not is_inside(path, excluded)))


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
                _merge_checkpoints(ended)
        elif isinstance(event, Event) and event.kind == EventKind.OP and stack:
            stack[-1].ops += observation.ops[event.a].node < 0
    return top


def _merge_checkpoints(call: _Call) -> None:
    """Take away the calls of checkpointed functions below a call that are all of it, or all of whose are one call's."""
    call.children = [_all_of(child) for child in call.children]
    if len(call.children) == 1 and call.children[0].ops == call.ops and not is_module_below(call.children[0].path):
        call.children = call.children[0].children


def _all_of(call: _Call) -> _Call:
    """Return the module call that is all that a checkpointed function does; the call itself if there is none."""
    is_one = len(call.children) == 1 and call.children[0].ops == call.ops
    return call.children[0] if is_one and call.path.startswith(CHECKPOINT) else call


def _choose(call: _Call, class_of: dict[str, str], chosen: set[str], *, repeated: bool = False) -> None:
    large = _large_enough(call)
    if large and (_is_container(call, class_of, recursive=not repeated) or call.ops > _MAX_OPS):
        counts = _class_counts(large, class_of)
        for child in large:
            _choose(child, class_of, chosen, repeated=counts[class_of.get(child.path, child.path)] >= 2)
    elif call.ops >= _MIN_OPS:
        chosen.add(call.path)


def _is_container(call: _Call, class_of: dict[str, str], *, recursive: bool) -> bool:
    large = _large_enough(call)
    counts = _class_counts(large, class_of)
    repeated_ops = sum(child.ops for child in large if counts[class_of.get(child.path, child.path)] >= 2)
    if large and 2 * repeated_ops >= call.ops:
        return True
    return recursive and any(
        2 * child.ops >= call.ops and _is_container(child, class_of, recursive=True) for child in large
    )


def _large_enough(call: _Call) -> list[_Call]:
    return [child for child in call.children if child.ops >= _MIN_OPS]


def _class_counts(calls: list[_Call], class_of: dict[str, str]) -> Counter[str]:
    return Counter(class_of.get(call.path, call.path) for call in calls)
