"""Put back what a backward has used up that keeps its graph, for the next one.

With ``retain_graph=True`` autograd releases no saved tensor, so that all that is rebuilt would stay until the graph
dies.  Instead, a handle's first read counts as its release.  What that uses up is noted before, and put back when the
backward ends: the next one rebuilds anew, as `torch.utils.checkpoint` does.
"""

from __future__ import annotations

from typing import Any

from tightfit.replay.values import TapedOp, TapedValue


class UsedUp:
    """What one backward has used up of one tape."""

    __slots__ = ("_ops", "_read", "_values", "copy", "graph_task")

    def __init__(self, graph_task: int) -> None:
        self.graph_task = graph_task
        self.copy: Any = None
        """The copy of the tape for what this backward saves again, see `copied_tape`."""
        self._read: set[int] = set()  # ids of handles, which live as long as the graph
        self._values: dict[TapedValue, tuple[Any, ...]] = {}
        self._ops: dict[TapedOp, tuple[Any, ...]] = {}

    def note(self, wanted: TapedValue) -> None:
        """Note the state of a value, and of all that rebuilding it may use up."""
        stack = [wanted]
        while stack:
            value = stack.pop()
            if value in self._values:
                continue
            self._values[value] = value.refs, value.source, value.version, value.memo, value.mark
            op = value.op
            if op is not None and op not in self._ops and not op.done:
                self._ops[op] = op.inputs, list(op.outputs), op.args, op.kwargs, op.random_state
                stack += op.inputs
                stack += op.outputs

    def is_first_read(self, handle: object) -> bool:
        """Return whether the handle was not read yet, and note that it is."""
        before = len(self._read)
        self._read.add(id(handle))
        return len(self._read) > before

    def state_of_value(self, value: TapedValue) -> tuple[Any, Any, Any, Any]:
        """Return source, version, memo and mark that a value had before the backward."""
        before = self._values.get(value)
        return before[1:] if before is not None else (value.source, value.version, value.memo, value.mark)

    def inputs_of(self, op: TapedOp) -> tuple[TapedValue, ...]:
        """Return the values that an operation read before the backward had used it up."""
        return self.state_of_op(op)[0]

    def state_of_op(self, op: TapedOp) -> tuple[tuple[TapedValue, ...], tuple[Any, ...], dict[str, Any], Any]:
        """Return inputs, arguments, named arguments and random state that an operation had before the backward."""
        before = self._ops.get(op)
        if before is None:
            return op.inputs, op.args, op.kwargs, op.random_state
        inputs, _, args, kwargs, random_state = before
        return inputs, args, kwargs, random_state

    def put_back(self) -> None:
        """Let the tape be as if the backward had not been."""
        for value, before in self._values.items():
            value.refs, value.source, value.version, value.memo, value.mark = before
        for op, before in self._ops.items():
            op.inputs, op.outputs, op.args, op.kwargs, op.random_state = before
            op.done = False
