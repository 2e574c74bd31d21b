"""Schedule recomputation: what runs again at which read, and what is held until when.

The engine follows it with tensors (`tightfit.replay.tape`), the simulator with bytes (`TapeModel`), so that the one
predicts what the other does.  References are counted: each saved tensor that was dropped, and each operation that is
yet to be recomputed, holds one on every value that it wants; what reaches zero is freed.

Reading a dropped value runs the missing operations, oldest first; results that somebody still wants are held as their
*memo*.  Having run gives an operation's references back, so that each runs at most once and memory falls as backward
goes on.  Where a tree divides the tape into leaves, only what the tree holds for the leaf that is read becomes a memo;
the rest only *passes*: it is dropped when this recomputation has used it, and its operations stay to run again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from tightfit.records.recompute_tree import RecomputeTree


class ScheduledValue:
    """What one storage holds between two writes."""

    __slots__ = ("last_leaf", "memo", "op", "refs", "source")

    op: Any
    """The operation that makes it; None if none on the tape does."""
    source: Any
    """What it is read from instead of being recomputed; None: it must be recomputed."""
    memo: Any
    """What recomputation made of it, while that is held; else None."""
    refs: int
    """Dropped saved tensors, and operations yet to be recomputed, that want it."""
    last_leaf: int
    """The last leaf of the tree that uses it."""


class ScheduledOp:
    """One operation that can be recomputed."""

    __slots__ = ("demanded", "done", "inputs", "leaf", "order", "outputs")

    order: int
    """Its place on the tape."""
    leaf: int
    """The leaf of the tree in which it ran."""
    inputs: Sequence[Any]
    """Values that it reads, each once."""
    outputs: Sequence[Any]
    demanded: bool
    """Something that was dropped wants what it makes: it holds references on its inputs."""
    done: bool
    """It will not run (again), and has given its references back."""


ValueT = TypeVar("ValueT", bound=ScheduledValue)
OpT = TypeVar("OpT", bound=ScheduledOp)


class Pass(Generic[ValueT]):
    """One recomputation: for which leaf it is, and what it only passes through."""

    __slots__ = ("leaf", "memos", "readers")

    def __init__(self, leaf: int, readers: Counter[ValueT]) -> None:
        self.leaf = leaf
        self.readers = readers
        """Of each value, how many operations of this recomputation are yet to read it."""
        self.memos: dict[ValueT, Any] = {}


class Schedule(ABC, Generic[ValueT, OpT]):
    """Decides what is recomputed, held and freed; what that is made of, tensors or bytes, is the subclass's."""

    tree: RecomputeTree | None

    def _demand(self, wanted: ValueT) -> None:
        """Put one more reference on a value, and on all that recomputing it needs."""
        stack = [wanted]
        while stack:
            value = stack.pop()
            value.refs += 1
            op = value.op
            if value.refs == 1 and value.source is None and op is not None and not op.demanded:
                op.demanded = True
                stack.extend(op.inputs)

    def _give_back(self, values: list[ValueT]) -> None:
        """Give back one reference on each of the values (the list is used up); free what nobody wants any more."""
        while values:
            value = values.pop()
            value.refs -= 1
            if value.refs:
                continue
            self._free(value)
            op = value.op
            if op is not None and op.demanded and not op.done and all(output.refs == 0 for output in op.outputs):
                values.extend(op.inputs)
                self._forget(op)

    def _recompute(self, wanted: ValueT, leaf: int) -> None:
        """Run what is missing for a value that is not at hand, read in this leaf."""
        todo: dict[int, OpT] = {}
        stack = [wanted]
        while stack:
            value = stack.pop()
            if value.memo is None and value.source is None:
                op = value.op
                if op is None or op.done:
                    raise RuntimeError(
                        "tightfit cannot rebuild a saved tensor: it, or what it is recomputed from, was changed after "
                        "autograd saved it (for example through .data or NumPy), which the plan did not know. Measure "
                        "the model again, or leave the module that uses it untouched: fit(..., exclude=module), or a "
                        "pattern of its path."
                    )
                if op.order not in todo:
                    todo[op.order] = op
                    stack.extend(op.inputs)
        going_on = Pass(leaf, Counter(value for op in todo.values() for value in op.inputs))
        for order in sorted(todo):
            self._run(todo[order], going_on)

    def _run(self, op: OpT, going_on: Pass[ValueT]) -> None:
        tree, readers = self.tree, going_on.readers
        stays = {
            value: value.refs != 0
            and value.source is None
            and (tree is None or tree.holds(op.leaf, value.last_leaf, going_on.leaf))
            for value in op.outputs
        }
        # It need not run again if everything that is still wanted of it stays.
        finished = all(stays[value] or value.refs == 0 or value.source is not None for value in op.outputs)
        made = self._execute(op, going_on, finished)
        for value in op.outputs:
            if value.memo is not None:
                continue  # from an earlier run, after which another result was still wanted
            if stays[value]:
                value.memo = self._take(value, made, True)
            elif readers[value] and value.source is None:
                going_on.memos[value] = self._take(value, made, False)
        inputs = op.inputs
        if finished:
            self._forget(op)
            self._give_back(list(inputs))
        for value in inputs:
            readers[value] -= 1
            if readers[value] == 0:
                going_on.memos.pop(value, None)

    def _may_overwrite(self, value: ValueT, going_on: Pass[ValueT], finished: bool) -> bool:
        """Hand over the memory of an input that the operation writes, if only this operation still wants it."""
        if value in going_on.memos and going_on.readers[value] == 1:
            del going_on.memos[value]
        elif value.memo is not None and value.refs == 1 and finished:
            value.memo = None
        else:
            return False
        return True

    @abstractmethod
    def _execute(self, op: OpT, going_on: Pass[ValueT], finished: bool) -> Any:
        """Run an operation and return what `_take` finds its results in."""

    @abstractmethod
    def _take(self, value: ValueT, made: Any, lasts: bool) -> Any:
        """Return an operation's result for one of its outputs: a memo if it `lasts`, else it passes."""

    @abstractmethod
    def _free(self, value: ValueT) -> None:
        """Let go of a value's memo and source: nobody wants it any more."""

    @abstractmethod
    def _forget(self, op: OpT) -> None:
        """Mark an operation as done, and let go of what it holds for a further run."""
