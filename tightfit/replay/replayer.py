"""Replay operations of a tape: rebuild what autograd saved and the plan dropped.

Reading a handle runs the missing operations, oldest first, below autograd; results that somebody still refers to are
held.  Releasing a handle, or having run an operation, gives the references back, and what reaches zero is freed.  What
runs when, and what is held until when, `tightfit.simulation.schedule` says, to the simulator, too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tightfit._torch_private.autograd import (
    backward_keeps_graph,
    call_after_backward,
    current_graph_task,
    set_grad_mode,
    top_saved_tensor_hooks,
)
from tightfit._torch_private.compiling import never_compiled
from tightfit._torch_private.dispatch import below_autograd, outside_batched_backward
from tightfit._torch_private.libraries import library_switches, switched
from tightfit._torch_private.tensors import version_counter, version_of
from tightfit.device import device_for
from tightfit.device.generators import AS_IT_WAS, drawing_from
from tightfit.operators.asking_for_modes import leave_modes_if_asked
from tightfit.operators.facts import result_tensors
from tightfit.records.recompute_tree import RecomputeTree
from tightfit.replay.rebuilt import Rebuilt
from tightfit.replay.refusals import WRITTEN_BEHIND, changed_error, modified_error, other_kernel_error
from tightfit.replay.self_check import SelfCheck
from tightfit.replay.statistics import Statistics
from tightfit.replay.taken_apart import TakenApart
from tightfit.replay.used_up import UsedUp
from tightfit.replay.values import Kept, Ref, TapedOp, TapedValue, before_write, contents, rebuild, written_refs
from tightfit.simulation.schedule import Pass, Schedule

#: What an operation returned, the storages of its arguments, and those of them that it wrote.
_Made = tuple[tuple[Any, ...], dict[TapedValue, torch.UntypedStorage], list[TapedValue]]

_T = TypeVar("_T")


class Handle:
    """What autograd holds instead of a dropped tensor."""

    __slots__ = ("__weakref__", "counter", "leaf", "ref", "replayer", "version")

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


@never_compiled
def unpack(packed: Any) -> Any:
    """Return the tensor for what autograd was given to hold."""
    leave_modes_if_asked()
    if type(packed) is Handle:
        return packed.replayer.read(packed)
    if type(packed) is Kept:
        return packed.read()
    if type(packed) is TakenApart:
        return packed.read(unpack)
    return packed


def _are_hooks_ours() -> bool:
    """Return whether what is saved now is given to a plan's hooks."""
    hooks = top_saved_tensor_hooks()
    return isinstance(hooks, tuple) and hooks[1] is unpack


class Replayer(Schedule[TapedValue, TapedOp]):
    """Replays what is on a tape; any thread may ask it to, forward having ended or not."""

    def __init__(
        self,
        statistics: Statistics,
        tree: RecomputeTree | None,
        check: SelfCheck | None,
        rebuilt: Rebuilt,
        notice: Callable[[torch.Tensor], None],
    ) -> None:
        """`notice` is told of a tensor whose storage was written unseen."""
        self.statistics = statistics
        self.tree = tree if tree is not None and tree.cuts else None
        self.check = check
        """The self-check of its region calls, while that is to be done."""
        self.rebuilt = rebuilt
        self._notice = notice
        self.interrupted: Callable[[], object] | None = None
        """Called when a backward reads it that runs inside the forward which it records."""
        self._released: list[TapedValue] | None = []  # while recording: what is saved later may want the same again
        self.lock = threading.RLock()
        self._acts = False
        self._died: deque[TapedValue] = deque()  # what handles wanted that died while somebody acted on the tape
        self._switches_now: tuple[Any, ...] = ()  # of libraries, in this backward
        self.used_up: UsedUp | None = None
        """What the backward that runs has used up, if that keeps its graph."""

    def read(self, handle: Handle) -> torch.Tensor:
        """Return the dropped tensor, rebuilt."""
        handle.check_version()
        graph_task = current_graph_task() if backward_keeps_graph() else -1
        if graph_task >= 0 and self.interrupted is not None:
            self.interrupted()
        makes_graph = torch.is_grad_enabled()
        if makes_graph and not _are_hooks_ours():
            # What another graph is made of (create_graph=True) is held by that one, as plain autograd holds it.
            graph_task = -1
        with AS_IT_WAS, below_autograd():  # before the tape's lock: who has this may wait for that
            return self._alone(self._read, handle, graph_task, makes_graph)

    def _read(self, handle: Handle, graph_task: int, makes_graph: bool) -> torch.Tensor:
        value = handle.ref.value
        storage = value.live.untyped_storage() if value.live is not None else None
        if storage is None and self.check is not None:
            storage = self.check.written_since(value)
        if storage is None and graph_task >= 0 and self._released is None:
            tensor = handle.ref.build(self._need_once(handle, graph_task))
            if makes_graph:
                self.rebuilt.note(tensor, handle)
            elif graph_task != self.rebuilt.planned:
                self.statistics.kept_graphs += 1
            return tensor
        if storage is None:
            if self.used_up is not None:
                self._put_back()
            storage = self._need(value, handle.leaf)
        return handle.ref.build(storage)

    def _alone(self, act: Callable[..., _T], *args: Any) -> _T:
        """Act on the tape.

        Handles whose death the garbage collector brings about in the midst of it are given back after it.
        """
        try:
            with self.lock:
                before = self._acts
                try:
                    self._acts = True
                    return act(*args)
                finally:
                    self._acts = before
        finally:
            self._bury()

    def _bury(self) -> None:
        """Give back the references of the handles that died, unless somebody acts, who then does it."""
        while self._died and not self._acts:
            with self.lock:
                self._bury_here()

    def _bury_here(self) -> None:
        if self._acts:
            return
        try:
            self._acts = True
            while self._died:
                value = self._died.popleft()
                if self.used_up is not None:
                    self._put_back()
                value.handles -= 1
                if not value.handles:
                    value.live = None
                if self._released is not None:
                    self._released.append(value)
                else:
                    self._give_back([value])
        finally:
            self._acts = False

    def _need_once(self, handle: Handle, graph_task: int) -> torch.UntypedStorage:
        """Return a value's bytes, and let go of them: in a backward that keeps its graph, nobody else does."""
        value = handle.ref.value
        used_up = self.keep_graph(graph_task)
        used_up.note(value)
        if contents(value) is None and (value.op is None or value.op.done):  # read, and let go of, before
            used_up.put_back()
        storage = self._need(value, handle.leaf)
        if used_up.is_first_read(handle):
            self._give_back([value])
        return storage

    def keep_graph(self, graph_task: int) -> UsedUp:
        """Note from now on what the backward of that id uses up, which keeps its graph."""
        used_up = self.used_up
        if used_up is None or used_up.graph_task != graph_task:
            self.put_back()
            used_up = self.used_up = UsedUp(graph_task)
            call_after_backward(self.put_back)
        return used_up

    def put_back(self) -> None:
        """Let the tape be as before the last backward that kept its graph."""
        if self.used_up is not None:
            self._alone(self._put_back)

    def _put_back(self) -> None:
        used_up, self.used_up = self.used_up, None
        if used_up is not None:
            used_up.put_back()

    def before_write(self, value: TapedValue, tensor: torch.Tensor) -> None:
        """Put aside what is needed of a value whose storage, which `tensor` shows, is about to be written."""
        with self.lock:
            self.put_back()
            if value.refs or value.handles:
                self._alone(before_write, value, tensor)

    def release(self, value: TapedValue) -> None:
        """Give back the reference of a handle that died."""
        self._died.append(value)
        self._bury()

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
        return self.check is not None and source is not None and not self.check.unchanged(value, source)

    def _look_again(self, value: TapedValue) -> None:
        """Take what a source held from its mark, where memory that may be written unseen was; asked at its first use.

        Raises:
            CannotRebuild: the mark is a checksum.
        """
        mark, value.mark = value.mark, None
        source = value.source
        if mark is None or source is None or mark.still_fits(source):
            return
        known = mark.copy_like(source)
        if known is not None:
            value.source, value.version = known, version_of(known)
        elif value.version is None or version_of(source) == value.version:  # else it was seen, and `contents` says so
            value.source = None
            self._notice(source)
            raise changed_error(source, WRITTEN_BEHIND)

    def _execute(self, op: TapedOp, going_on: Pass[TapedValue], finished: bool) -> _Made:
        self.statistics.replayed_ops += 1
        memos = going_on.memos
        storages: dict[TapedValue, torch.UntypedStorage] = {}
        written = written_refs(op)
        for value in op.inputs:
            if value.mark is not None:
                self._look_again(value)
            held = memos[value] if value in memos else contents(value)
            assert held is not None
            if self.check is not None and self._is_changed(value):
                assert value.source is not None
                raise changed_error(value.source, WRITTEN_BEHIND)
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
            with AS_IT_WAS, switched(op.switches):
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
