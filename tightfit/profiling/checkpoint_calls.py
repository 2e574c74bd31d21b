"""Decide, in a step that is observed, which of the model's own `torch.utils.checkpoint` calls a plan takes over.

What a call itself tells, `tightfit.operators.checkpoint_calls` looks at.  Here is what only the step shows: functions
that change something when they run, so that the model's own second run changes it twice; what is written after them, so
that its second run reads other contents; random numbers that its second run would draw anew; and, of the reentrant
form, gradients that would be added in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from tightfit._torch_private.autograd import current_graph_task, graph_position, position_of_node
from tightfit.operators._checkpoint_private import CheckpointCall
from tightfit.operators.checkpoint_calls import checkpoint_path, reason_to_leave

_WRITES = "it changes what it did not make, or hands its memory out, which checkpointing does twice"
_WRITTEN_LATER = "what it reads, or makes and saves, may be written after it, and checkpointing reads or makes it anew"
_DRAWS = "it draws random numbers, and preserve_rng_state=False has them drawn anew in backward"
_SHARES = (
    "it is reentrant, and uses weights or tensors that other code uses, too: their gradients would be added in another "
    "order"
)
_GETS_NONE = "it is reentrant, and a result of it gets no gradient, where PyTorch's form gives its weights zeros"
_EXCLUDED = "it is called inside an excluded module"
_AS_IT_IS = "as the model does it, the step takes less memory than under any plan"


@dataclass(slots=True)
class _Open:
    """A call that was taken over."""

    path: str
    preserves_random_state: bool
    first_storage: int
    """What it makes itself has this index, or a larger one."""
    argument_count: int
    """How many nodes of autograd's graph, the first ones that it makes, stand for arguments."""
    first_node: int = 0
    end_node: int = 0
    """Between these, the nodes that it makes."""
    storages: set[int] = field(default_factory=set)
    """What it, or a call inside it, reads and did not make, and what autograd saves."""


class CheckpointCalls:
    """Notes the calls of one observed step.

    Args:
        left: paths whose calls are left to PyTorch, and why, from earlier runs of the step; None: all are.
    """

    def __init__(self, left: Mapping[str, str] | None) -> None:
        self.left = dict(left or {})
        self._leaves_all = left is None
        self.taken: set[str] = set()
        self._open: list[_Open] = []
        self._reentrant: list[_Open] = []
        self._used: dict[int, set[str]] = {}  # by storage: paths of calls that are over, and read it or saved it

    @property
    def decisions(self) -> Mapping[str, str]:
        """By path, why its calls are left alone; empty for those that are taken over."""
        return {**dict.fromkeys(sorted(self.taken), ""), **self.left}

    @property
    def is_consistent(self) -> bool:
        """Whether no call was taken over that turned out to be one to leave alone."""
        return self.taken.isdisjoint(self.left)

    def takes(self, call: CheckpointCall, *, excluded: bool) -> bool:
        """Decide about a call."""
        path = checkpoint_path(call.function)
        if current_graph_task() >= 0:
            return False
        reason = _AS_IT_IS if self._leaves_all else _EXCLUDED if excluded else reason_to_leave(call)
        if reason:
            self.left.setdefault(path, reason)
        if path in self.left:
            return False
        self.taken.add(path)
        return True

    @contextmanager
    def inside(self, call: CheckpointCall, storage_count: int) -> Iterator[None]:
        """Run the function of a call that was taken over; so many storages are known before."""
        arguments = sum(isinstance(one, torch.Tensor) and one.requires_grad for one in call.args)
        one = _Open(checkpoint_path(call.function), call.preserves_random_state, storage_count, arguments)
        self._open.append(one)
        if call.is_reentrant:
            self._reentrant.append(one)
            one.first_node = graph_position()
        try:
            yield
        finally:
            one.end_node = graph_position()
            self._open.remove(one)
            for storage in one.storages:
                self._used.setdefault(storage, set()).add(one.path)

    @property
    def is_open(self) -> bool:
        """Whether a call runs that was taken over."""
        return bool(self._open)

    def note_random(self) -> None:
        """Note that an operation of forward draws random numbers."""
        for one in self._open:
            if not one.preserves_random_state:
                self.left.setdefault(one.path, _DRAWS)

    def note_read(self, storage: int, *, is_read_again: bool, is_exposed: bool) -> None:
        """Note that an operation reads a storage.

        `is_read_again`: the innermost call did not make it, or what reads it is left to PyTorch's checkpoint.
        `is_exposed`: it may be written at any moment, unseen.
        """
        if is_read_again or storage < self._open[-1].first_storage:
            self.note_saved(storage)
        for one in self._open:
            if is_exposed and storage < one.first_storage:
                self.left.setdefault(one.path, _WRITTEN_LATER)

    def note_saved(self, storage: int) -> None:
        """Note that backward needs a storage as it is now."""
        for one in self._open:
            one.storages.add(storage)

    def note_write(self, storage: int) -> None:
        """Note that a storage is written in place, or may be from now on.

        The model's own second run makes anew what the function made, and reads the rest as it is by then.  Run as
        other code, the function has saved what it made and read at first: autograd reads that, or refuses it.
        """
        for one in self._open:
            if storage < one.first_storage:
                self.left.setdefault(one.path, _WRITES)
        for path in self._used.get(storage, ()):
            self.left.setdefault(path, _WRITTEN_LATER)

    def note_graph(self, loss: torch.Tensor) -> None:
        """Look at the graph that forward has made, where calls of the reentrant form were taken over.

        What goes into such a call beside its arguments must be weights that nothing else uses.
        """
        if not self._reentrant:
            return
        users: dict[object, set[int]] = {}  # of each leaf: the calls that use it; -1 for other code
        seen, stack = set(), [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            here = self._calls_at(position_of_node(node))
            for before, _ in node.next_functions:
                if before is None:
                    continue
                stack.append(before)
                if hasattr(before, "variable"):
                    users.setdefault(before, set()).add(here[-1] if here else -1)
                    continue
                there = self._calls_at(position_of_node(before), with_arguments=True)
                for index in set(here) - set(there):
                    self.left.setdefault(self._reentrant[index].path, _SHARES)
                for index in set(self._calls_at(position_of_node(before))) - set(here):
                    before.register_prehook(partial(self._note_gradients, self._reentrant[index].path))
        for index in {index for calls in users.values() if len(calls) > 1 for index in calls if index >= 0}:
            self.left.setdefault(self._reentrant[index].path, _SHARES)

    def _note_gradients(self, path: str, gradients: tuple[torch.Tensor | None, ...]) -> None:
        """Note what the node of a result of a call gets in backward."""
        if all(gradient is None for gradient in gradients):
            self.left.setdefault(path, _GETS_NONE)

    def _calls_at(self, position: int, *, with_arguments: bool = False) -> list[int]:
        """Return the calls that made the node at a position of the graph, the outermost first.

        The first nodes stand for a call's arguments: there gradients are summed as by PyTorch's own node.
        """
        return [
            index
            for index, one in enumerate(self._reentrant)
            if one.first_node + (0 if with_arguments else one.argument_count) <= position < one.end_node
        ]
