"""Replay operations of a tape: rebuild what autograd saved and the plan dropped.

Reading a handle runs the missing operations, oldest first, below autograd; results that somebody still refers to are
held.  Releasing a handle, or having run an operation, gives the references back, and what reaches zero is freed.  What
runs when, and what is held until when, `tightfit.simulation.schedule` says, to the simulator, too.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from tightfit._torch_private import (
    backward_keeps_graph,
    below_autograd,
    call_after_backward,
    current_graph_task,
    library_switches,
    outside_batched_backward,
    set_grad_mode,
    switched,
    version_counter,
    version_of,
)
from tightfit.device import device_for
from tightfit.device.generators import drawing_from
from tightfit.operators.facts import result_tensors
from tightfit.records.recompute_tree import RecomputeTree
from tightfit.replay.contents import mark_of
from tightfit.replay.refusals import changed_error, modified_error, other_kernel_error
from tightfit.replay.self_check import SelfCheck
from tightfit.replay.statistics import Statistics
from tightfit.replay.used_up import UsedUp
from tightfit.replay.values import Ref, TapedOp, TapedValue, before_write, contents, rebuild, written_refs
from tightfit.simulation.schedule import Pass, Schedule

#: What an operation returned, the storages of its arguments, and those of them that it wrote.
_Made = tuple[tuple[Any, ...], dict[TapedValue, torch.UntypedStorage], list[TapedValue]]


class Handle:
    """What autograd holds instead of a dropped tensor."""

    __slots__ = ("counter", "leaf", "ref", "replayer", "version")

    def __init__(self, replayer: Replayer, ref: Ref, tensor: torch.Tensor, leaf: int) -> None:
        self.replayer = replayer
        self.ref = ref
        self.leaf = leaf  # of the tape's tree, in which it was saved
        self.counter = version_counter(tensor)
        self.version = version_of(tensor)

    def check_version(self) -> None:
        """Raise as plain autograd does if the tensor was written after being saved, wherever that was."""
        if version_of(self.counter) != self.version:
            raise modified_error(self.ref.dtype, self.ref.size, version_of(self.counter), self.version)

    def __del__(self) -> None:
        self.replayer.release(self.ref.value)


class Replayer(Schedule[TapedValue, TapedOp]):
    """Replays what is on a tape; any thread may ask it to, forward having ended or not."""

    def __init__(self, statistics: Statistics, tree: RecomputeTree | None, check: SelfCheck | None) -> None:
        self._statistics = statistics
        self._tree = tree if tree is not None and tree.cuts else None
        self._check = check
        self._released: list[TapedValue] | None = []  # while recording: what is saved later may want the same again
        self._lock = threading.RLock()
        self._switches_now: tuple[Any, ...] = ()  # of libraries, in this backward
        self._used_up: UsedUp | None = None  # by the backward that runs, if that keeps its graph

    def read(self, handle: Handle) -> torch.Tensor:
        """Return the dropped tensor, rebuilt."""
        handle.check_version()
        value = handle.ref.value
        # What another graph is made of (create_graph=True) is held by that one, as plain autograd holds it.
        graph_task = -1 if torch.is_grad_enabled() or not backward_keeps_graph() else current_graph_task()
        with self._lock, below_autograd():
            storage = value.live.untyped_storage() if value.live is not None else None
            if storage is None and self._check is not None:
                storage = self._check.written_since(value)
            if storage is None and graph_task >= 0 and self._released is None:
                storage = self._need_once(handle, graph_task)
            elif storage is None:
                self.put_back()
                storage = self._need(value, handle.leaf)
            return handle.ref.build(storage)

    def _need_once(self, handle: Handle, graph_task: int) -> torch.UntypedStorage:
        """Return a value's bytes, and let go of them: in a backward that keeps its graph, nobody else does."""
        value = handle.ref.value
        if self._used_up is None or self._used_up.graph_task != graph_task:
            self.put_back()
            self._used_up = UsedUp(graph_task)
            self._statistics.kept_graphs += 1
            call_after_backward(self.put_back)
        used_up = self._used_up
        used_up.note(value)
        if contents(value) is None and (value.op is None or value.op.done):  # read, and let go of, before
            used_up.put_back()
        storage = self._need(value, handle.leaf)
        if used_up.is_first_read(handle):
            self._give_back([value])
        return storage

    def put_back(self) -> None:
        """Let the tape be as before the last backward that kept its graph."""
        with self._lock:
            used_up, self._used_up = self._used_up, None
            if used_up is not None:
                used_up.put_back()

    def before_write(self, value: TapedValue, tensor: torch.Tensor) -> None:
        """Put aside what is needed of a value whose storage, which `tensor` shows, is about to be written."""
        with self._lock:
            self.put_back()
            if value.refs or value.handles:
                before_write(value, tensor)

    def release(self, value: TapedValue) -> None:
        """Give back the reference of a handle that died."""
        with self._lock:
            self.put_back()
            value.handles -= 1
            if not value.handles:
                value.live = None
            if self._released is not None:
                self._released.append(value)
            else:
                self._give_back([value])

    def _need(self, wanted: TapedValue, leaf: int) -> torch.UntypedStorage:
        storage = contents(wanted)
        if storage is None:
            self._switches_now = library_switches()
            with outside_batched_backward():  # what forward has saved is not batched
                self._recompute(wanted, leaf)
            storage = contents(wanted)
            assert storage is not None
        return storage

    def _is_changed(self, value: TapedValue) -> bool:
        """Return whether, during the self-check, somebody wrote into a source, unseen."""
        source = value.source
        return self._check is not None and source is not None and not self._check.unchanged(value, source)

    def _is_changed_elsewhere(self, value: TapedValue) -> bool:
        """Return whether memory that may be written unseen was, since the region ended; asked at its first use."""
        expected, value.mark = value.mark, None
        return expected is not None and value.source is not None and mark_of(value.source) != expected

    def _execute(self, op: TapedOp, going_on: Pass[TapedValue], finished: bool) -> _Made:
        self._statistics.replayed_ops += 1
        memos = going_on.memos
        storages: dict[TapedValue, torch.UntypedStorage] = {}
        written = written_refs(op)
        for value in op.inputs:
            held = memos[value] if value in memos else contents(value)
            assert held is not None
            if self._is_changed(value) or self._is_changed_elsewhere(value):
                assert value.source is not None
                raise changed_error(value.source, "behind PyTorch's back (for example through NumPy, or by BatchNorm)")
            if value in written and not self._may_overwrite(value, going_on, finished):
                held = held.clone()
            storages[value] = held

        if op.info.is_convolution:
            reasons = [device_for(storage.device).convolutions_differ_by_thread() for storage in storages.values()]
            if any(reasons):
                raise other_kernel_error(op.info.name, next(filter(None, reasons)))
        args = [rebuild(a, storages) for a in op.args]
        kwargs = {name: rebuild(a, storages) for name, a in op.kwargs.items()}
        set_grad_mode(op.grad)
        if op.switches == self._switches_now:
            result = _call(op, args, kwargs)
        else:
            with switched(op.switches):
                result = _call(op, args, kwargs)
        return result_tensors(result), storages, list(written)

    def _take(self, value: TapedValue, made: _Made, lasts: bool) -> torch.UntypedStorage:
        results, storages, written = made
        output = value.output
        storage = results[output].untyped_storage() if output >= 0 else storages[written[-1 - output]]
        if storage.nbytes() != value.nbytes:
            assert value.op is not None
            raise RuntimeError(
                f"replaying {value.op.info.name} gave a storage of {storage.nbytes()} bytes instead of {value.nbytes}: "
                "the operation is not a function of its inputs. Please report this operation."
            )
        return storage

    def _free(self, value: TapedValue) -> None:
        value.memo = None
        value.source = None

    def _forget(self, op: TapedOp) -> None:
        op.done = True
        op.inputs = ()  # breaks reference cycles
        op.outputs = []
        op.args = ()
        op.kwargs = {}
        op.random_state = None


def _call(op: TapedOp, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if op.random_state is None:
        return op.func(*args, **kwargs)
    assert op.generator is not None
    with drawing_from(op.generator, op.random_state):
        return op.func(*args, **kwargs)
