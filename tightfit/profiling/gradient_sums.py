"""Sums of gradients, as they happen in a real step.

Where a value was used twice, autograd's engine adds its gradients.  It does so in the first one's memory if nobody else
refers to that, but never while a dispatch mode looks on: then the sum is a new tensor.  What is written down is what
happens in a real step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tightfit._torch_private import current_graph_node, is_view, storage_key
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.records import Event, EventKind


@dataclass(frozen=True, slots=True)
class _Sum:
    """Autograd's engine has just added a second gradient of one value to the first."""

    since: int
    """Index of the first event that belongs to it."""
    old: int
    """Storage of the first gradient."""
    new: int
    """Storage of the sum."""
    key: int
    """Where the sum's storage is."""


class GradientSums:
    """See the module."""

    def __init__(self, ledger: StorageLedger) -> None:
        ledger.before_event = self._before
        self._ledger = ledger
        self._graph_task = -1
        self._in_engine = False
        """The running node's own operations are done: what comes now is autograd's engine adding up gradients."""
        self._sum: _Sum | None = None

    def follow(self, graph_task: int) -> None:
        """This backward runs now (-1: none)."""
        if graph_task != self._graph_task:
            self._graph_task = graph_task
            self._in_engine = False
            if graph_task >= 0:
                self._follow_nodes()

    def note(self, func: Any, args: tuple[Any, ...], result: Any, since: int) -> None:
        """An operation of backward, and the first of its events."""
        ledger = self._ledger
        if (
            self._in_engine
            and func is torch.ops.aten.add.Tensor
            and ledger.counts(args[0])
            and ledger.counts(result)
            and _accumulates_in_place(*args)
        ):
            old, new = (ledger.observation.values[ledger.value_of(t)].storage for t in (args[0], result))
            self._sum = _Sum(since, old, new, storage_key(result))

    def settle(self) -> None:
        """All that the engine let go of after a sum is known: was the first gradient its own?"""
        found = self._sum
        if found is None:
            return
        self._sum = None
        observation = self._ledger.observation
        events = observation.events[found.since :]
        if Event(EventKind.FREE, found.old) not in events or Event(EventKind.ALLOC, found.new) not in events:
            return
        events.remove(Event(EventKind.ALLOC, found.new))
        events.remove(Event(EventKind.FREE, found.old))
        observation.events[found.since :] = [
            Event(EventKind.FREE, found.old) if event == Event(EventKind.FREE, found.new) else event for event in events
        ]
        self._ledger.merge(found.new, found.key, found.old)

    def _before(self, kind: EventKind) -> None:
        if self._sum is not None and kind != EventKind.FREE:
            self.settle()

    def _follow_nodes(self) -> None:
        """Have every node that this backward may run say when its own operations are done."""
        sums = weakref.ref(self)

        def say(in_engine: bool) -> Callable[..., None]:
            def hook(*_: object) -> None:
                this = sums()
                if this is not None:
                    this._in_engine = in_engine

            return hook

        begins, ends = say(in_engine=False), say(in_engine=True)
        stack = [node for node in (current_graph_node(),) if node is not None]
        followed = set(stack)
        while stack:
            node = stack.pop()
            node.register_prehook(begins)
            if node.next_functions:  # not one that adds to a parameter's gradient, and cares who else refers to it
                node.register_hook(ends)
            for following, _ in node.next_functions:
                if following is not None and following not in followed:
                    followed.add(following)
                    stack.append(following)


def _accumulates_in_place(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether autograd's engine would add `new` to `old` in place, if nobody else refers to `old`: each of its elements
    has its own place in one block of memory, and it is nobody's view (a view refers to its base).
    """
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(old.size(), old.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return not is_view(old) and (new.layout is not torch.strided or storage_key(old) != storage_key(new))
