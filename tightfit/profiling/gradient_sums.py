"""Record gradient accumulation as it happens in a real step.

Where a value was used twice, autograd's engine sums its gradients.  It does so in the first gradient's memory if nobody
else refers to that, but never under a dispatch mode: then the sum is a new tensor.  `GradientSums` rewrites the events
of such a sum to those of a step without the mode.

The rule is that of `can_accumulate_inplace` in PyTorch's torch/csrc/autograd/input_buffer.cpp.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tightfit._torch_private.autograd import current_graph_node
from tightfit._torch_private.tensors import is_view, storage_key
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.records import Event, EventKind


@dataclass(frozen=True, slots=True)
class _Sum:
    """An addition by which autograd's engine has just summed two gradients of one value."""

    since: int
    """Index of its first event."""
    old: int
    """Storage of the first gradient."""
    new: int
    """Storage of the sum."""
    key: int
    """The sum's `storage_key`."""


class GradientSums:
    """Finds the engine's sums among the ops of backward, and records in-place ones as such."""

    def __init__(self, ledger: StorageLedger) -> None:
        ledger.before_event = self._before_event
        self._ledger = ledger
        self._graph_task = -1
        self._in_engine = False
        """Whether the running node's own ops are done, so that the next additions are the engine's."""
        self._sum: _Sum | None = None

    def set_graph_task(self, graph_task: int) -> None:
        """Take the id of the backward that runs now (-1: none); register hooks on the nodes of a new one."""
        if graph_task != self._graph_task:
            self._graph_task = graph_task
            self._in_engine = False
            if graph_task >= 0:
                self._hook_nodes()

    def record_op(self, func: Any, args: tuple[Any, ...], result: Any, since: int) -> None:
        """Check whether an op of backward, whose first event has the index `since`, is a sum by the engine."""
        ledger = self._ledger
        if (
            self._in_engine
            and not torch.is_grad_enabled()  # else what made the first gradient is part of a graph (create_graph=True)
            and func is torch.ops.aten.add.Tensor
            and ledger.counts(args[0])
            and ledger.counts(result)
            and _accumulates_in_place(*args)
        ):
            old, new = (ledger.observation.values[ledger.value_of(t)].storage for t in (args[0], result))
            self._sum = _Sum(since, old, new, storage_key(result))

    def resolve(self) -> None:
        """Decide about the last sum, now that all that the engine freed after it is known.

        If the first gradient died with the sum, nobody else held it: a real step sums in its memory.
        """
        last = self._sum
        if last is None:
            return
        self._sum = None
        observation = self._ledger.observation
        events = observation.events[last.since :]
        if Event(EventKind.FREE, last.old) not in events or Event(EventKind.ALLOC, last.new) not in events:
            return
        events.remove(Event(EventKind.ALLOC, last.new))
        events.remove(Event(EventKind.FREE, last.old))
        observation.events[last.since :] = [
            Event(EventKind.FREE, last.old) if event == Event(EventKind.FREE, last.new) else event for event in events
        ]
        self._ledger.merge(last.new, last.key, last.old)

    def _before_event(self, kind: EventKind) -> None:
        if self._sum is not None and kind != EventKind.FREE:
            self.resolve()

    def _hook_nodes(self) -> None:
        """Register hooks on every node that this backward may run, to learn when its own ops begin and end."""
        sums = weakref.ref(self)

        def set_in_engine(in_engine: bool) -> Callable[..., None]:
            def hook(*_: object) -> None:
                this = sums()
                if this is not None:
                    this._in_engine = in_engine

            return hook

        begins, ends = set_in_engine(False), set_in_engine(True)
        stack = [node for node in (current_graph_node(),) if node is not None]
        visited = set(stack)
        while stack:
            node = stack.pop()
            node.register_prehook(begins)
            # Not on AccumulateGrad: it looks at the gradient's reference count, which a hook would change.
            if node.next_functions:
                node.register_hook(ends)
            for following, _ in node.next_functions:
                if following is not None and following not in visited:
                    visited.add(following)
                    stack.append(following)


def _accumulates_in_place(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Tell whether autograd's engine adds `new` to `old` in place where nobody else refers to `old`.

    `old` has to be dense without overlap, and no view (a view refers to its base).
    """
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(old.size(), old.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return not is_view(old) and (new.layout is not torch.strided or storage_key(old) != storage_key(new))
