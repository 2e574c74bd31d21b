"""Drop what a backward inside forward saves for a graph of its own (``create_graph=True``).

What its nodes save is in part what they have just read: values of forward, which were rebuilt for them.  Of these
autograd gets handles there, too.  A later backward reads them and forward's own handles at different times.  So the
operations are copied, with references of their own: through each graph a backward lets go of what it has rebuilt as
soon as it has used it.

The rest it has computed itself.  What it runs for the nodes of a region is recorded behind the copies of that region's
operations, and is rebuilt from these and from the gradients that come in from other regions.
"""

from __future__ import annotations

from typing import Any

import torch

from tightfit._torch_private.autograd import call_after_backward, current_graph_task
from tightfit._torch_private.libraries import library_switches
from tightfit._torch_private.tensors import is_conj_or_neg, storage_key
from tightfit.replay.rebuilt import Rebuilt
from tightfit.replay.repeats import Repeats
from tightfit.replay.replayer import Handle
from tightfit.replay.tape import Tape
from tightfit.replay.values import Ref, TapedOp, TapedRegion, TapedValue, can_rebuild
from tightfit.replay.write_watch import WriteWatch


def handle_again(tensor: torch.Tensor, rebuilt: Rebuilt, writes: WriteWatch) -> Handle | None:
    """Return what autograd shall hold of a tensor that a backward saves; None if that was not rebuilt for it."""
    handle: Handle | None = rebuilt.handle_of(tensor)
    if handle is None or is_conj_or_neg(tensor):
        return None
    owner: Tape = handle.replayer  # type: ignore[assignment]  # every replayer is a tape
    graph_task = current_graph_task()
    with owner.lock, owner.root.lock:
        if owner.used_up is None or owner.used_up.graph_task != graph_task:
            return None
        return CopiedTape.of(owner.root, graph_task, writes, None).handle_again(tensor, handle)


class CopiedTape(Tape):
    """Operations of a tape once more, as far as something needs them, and what a backward runs for its nodes."""

    def __init__(self, tape: Tape, writes: WriteWatch, repeats: Repeats | None) -> None:
        """Copy nothing yet. It records no operations before `resume`."""
        super().__init__(tape.statistics, writes, tape.tree, tape.check, repeats, tape.rebuilt)
        self._root = tape
        self._first_order = tape.further_order()
        # By the value or operation that was copied; of one that is a copy itself, by what that is a copy of.
        self._values: dict[TapedValue, TapedValue] = {}
        self._copied_ops: dict[TapedOp, TapedOp] = {}
        self._originals: dict[TapedValue | TapedOp, Any] = {}  # of the copies

    @classmethod
    def of(cls, root: Tape, graph_task: int, writes: WriteWatch, repeats: Repeats | None) -> CopiedTape:
        """Return the copy of a tape for what the backward of that id saves."""
        used_up = root.keep_graph(graph_task)
        if used_up.copy is None:
            used_up.copy = cls(root, writes, repeats)
            call_after_backward(used_up.copy.seal)
        copy: CopiedTape = used_up.copy
        return copy

    @property
    def root(self) -> Tape:
        """The tape that it copies."""
        return self._root

    def resume(self, region: TapedRegion) -> None:
        """Record what the backward runs for the nodes of a region."""
        self._region = region
        self._switches = library_switches()
        self._go_to(region.position)

    def handle_again(self, tensor: torch.Tensor, of: Handle) -> Handle | None:
        """Return a handle for a tensor that another one was read for; None if it could not be rebuilt again."""
        with self.lock:
            value = self._copied(of.ref.value, of.replayer)  # type: ignore[arg-type]  # every replayer is a tape
            if not can_rebuild(value):
                return None
            self._demand(value)
            value.handles += 1
            self._writes.add(value.address.key, value, self)
        self.statistics.dropped_slots += 1
        found = Handle(self, Ref(value, tensor), tensor, of.leaf)
        found.counter, found.version = of.counter, of.version  # plain autograd would hold that very tensor
        return found

    def seal(self) -> None:
        """End what is recorded: let go of everything that no handle needs."""
        with self.lock:
            if self._released is None:
                return
            super().seal()
            for value in self._values.values():
                if not value.refs:
                    value.source = value.memo = None
            for op in self._copied_ops.values():
                if not op.demanded:
                    self._forget(op)

    def _sight(self, tensor: torch.Tensor) -> TapedValue:
        handle = self.rebuilt.handle_of(tensor)
        if handle is not None and handle.replayer.root is self._root:
            with handle.replayer.lock:
                return self._copied(handle.ref.value, handle.replayer)
        return super()._sight(tensor)

    def original(self, one: Any) -> Any:
        """Return the value or operation that one of this tape is a copy of; itself if of none."""
        return self._originals.get(one, one)

    def _copied(self, wanted: TapedValue, owner: Tape) -> TapedValue:
        """Return the copy of a value of a tape, with all that rebuilding it needs, as it was before the backward."""
        used_up, original = owner.used_up, owner.original
        ops: list[TapedOp] = []
        stack = [wanted]
        while stack:
            value = stack.pop()
            if original(value) in self._values:
                continue
            copy = self._values[original(value)] = self._copy_of_value(value, owner)
            self._originals[copy] = original(value)
            op = value.op
            if op is None or copy.source is not None or copy.memo is not None:
                continue
            if original(op) not in self._copied_ops:
                copied = self._copied_ops[original(op)] = _copy_of_op(op)
                self._originals[copied] = original(op)
                ops.append(op)
                stack += op.inputs if used_up is None else used_up.inputs_of(op)
            copy.op = self._copied_ops[original(op)]
            copy.op.outputs.append(copy)
        for op in ops:
            copied = self._copied_ops[original(op)]
            state = (op.inputs, op.args, op.kwargs, op.random_state) if used_up is None else used_up.state_of_op(op)
            inputs, args, kwargs, copied.random_state = state
            copied.inputs = tuple(self._values[original(value)] for value in inputs)
            copied.args = tuple(self._renamed(argument, owner) for argument in args)
            copied.kwargs = {name: self._renamed(argument, owner) for name, argument in kwargs.items()}
        return self._values[original(wanted)]

    def _copy_of_value(self, value: TapedValue, owner: Tape) -> TapedValue:
        used_up = owner.used_up
        copy = TapedValue(value.address, value.nbytes)
        copy.output = value.output
        now = value.source, value.version, value.memo, value.mark
        copy.source, copy.version, copy.memo, copy.mark = now if used_up is None else used_up.state_of_value(value)
        copy.last_leaf = value.last_leaf
        copy.live = value.live
        if copy.source is not None:
            self._writes.add(storage_key(copy.source), copy, self)
        if self.check is not None:
            self.check.copied(value, copy)
        return copy

    def _renamed(self, argument: Any, owner: Tape) -> Any:
        if isinstance(argument, Ref):
            return argument.of(self._values[owner.original(argument.value)])
        if isinstance(argument, list | tuple):
            return type(argument)(self._renamed(a, owner) for a in argument)
        return argument


def _copy_of_op(op: TapedOp) -> TapedOp:
    copy = TapedOp(op.region, op.position, op.order, op.leaf, op.func, op.info)
    copy.grad, copy.switches, copy.generator = op.grad, op.switches, op.generator
    return copy
