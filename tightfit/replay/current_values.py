"""Know which value each storage holds while operations are recorded, and what autograd holds instead of it.

A value ends with the next write to its storage.  It is a *source* if the tape holds it (made outside the region, kept
by the plan, or not replayable), else it is rebuilt.  What is written unseen shows in the self-check, or by a source's
mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tightfit._torch_private.tensors import WeakStorage, alias, is_conj_or_neg, storage_key, version_of
from tightfit.device.placement import StreamWatch
from tightfit.operators.facts import OpInfo, learn_undeclared_writes, result_tensors
from tightfit.operators.wrapper_tensors import held_as_parts, wraps
from tightfit.records.recompute_tree import RecomputeTree
from tightfit.replay.rebuilt import Rebuilt
from tightfit.replay.replayer import Handle, Replayer
from tightfit.replay.self_check import SelfCheck
from tightfit.replay.source_mark import mark_of_source
from tightfit.replay.statistics import Statistics
from tightfit.replay.taken_apart import TakenApart
from tightfit.replay.values import (
    Kept,
    Ref,
    TapedOp,
    TapedRegion,
    TapedValue,
    before_write,
    can_rebuild,
    copy_of_storage,
    may_be_statistics,
)
from tightfit.replay.write_watch import WriteWatch

_Tensor = torch.Tensor


class CurrentValues(Replayer):
    """The values that storages hold now, as far as a tape knows them."""

    def __init__(
        self,
        statistics: Statistics,
        writes: WriteWatch,
        tree: RecomputeTree | None,
        check: SelfCheck | None,
        rebuilt: Rebuilt,
    ) -> None:
        super().__init__(statistics, tree, check, rebuilt, writes.notice)
        self._writes = writes
        self._region: TapedRegion | None = None
        self._leaf = 0  # of the next operation
        self._current: dict[int, TapedValue] = {}  # storage address -> what it holds now
        self._held: list[TapedValue] = []  # sources taken while recording
        self._movable: list[TapedValue] = []  # of those, what may be running statistics, not copied yet
        self._ops: list[TapedOp] = []
        # Storages whose parts have version counters of their own. Their addresses stay reserved: what came
        # to lie at one later would be taken for such a part, and kept.
        self._split: dict[int, WeakStorage] = {}
        self._streams = StreamWatch()

    def _note(self, argument: Any, inputs: dict[TapedValue, None]) -> Any:
        """Replace the tensors of an argument by references to values; values that are sources get held."""
        if isinstance(argument, _Tensor):
            value = self._sight(argument)
            value.last_leaf = self._leaf
            kept = value.op is None or value.op.region.keeps(value)
            if kept and value.source is None and not value.uninitialised:
                value.source = alias(argument)
                self._held.append(value)
                is_movable = may_be_statistics(argument)
                if is_movable:
                    self._movable.append(value)
                    if self._region is None or not self._region.on_plan:
                        self._copy_movable()
                if self.check is None and (is_movable or value.op is None):
                    value.mark = mark_of_source(argument, self._writes.known)
            inputs[value] = None
            return Ref(value, argument)
        if isinstance(argument, list | tuple):
            return type(argument)(self._note(a, inputs) for a in argument)
        return argument

    def _copy_movable(self) -> None:
        """Copy what may be running statistics: only a plan knows which of them move later, and spares those."""
        for value in self._movable:
            if value.source is not None:
                value.source = copy_of_storage(value.source)
        self._movable = []

    def _sight(self, tensor: _Tensor) -> TapedValue:
        """Return the value that a tensor's storage holds now; what the region did not make is external."""
        key = storage_key(tensor)
        value = self._current.get(key)
        if value is not None and self.check is not None and not self.check.unchanged(value, tensor):
            value = None  # something wrote into it behind the dispatcher's back
        elif value is not None and value.mark is not None and not value.mark.fits(tensor):
            if value.source is not None:
                value.source = value.mark.copy_like(value.source)
            if value.source is None:
                self._notice(tensor)
            value.mark = None
            value = None
        if value is None:
            value = TapedValue(WeakStorage(tensor), tensor.untyped_storage().nbytes())
            self._current[key] = value
            if self.check is not None:
                self.check.remember(value, tensor)
        return value

    def about_to_write(self, tensor: _Tensor) -> None:
        """Note that the contents of the tensor's storage are about to change."""
        key = storage_key(tensor)
        old = self._current.pop(key, None)
        if old is None:
            return
        if old.handles and old.live is None:
            self.statistics.written_after_drop += 1  # the plan keeps what it saw written: this is a surprise
        self._alone(before_write, old, tensor)

    def _written_unseen(self, func: Any, changed: list[tuple[int, _Tensor]]) -> None:
        """Learn that an operation that is not PyTorch's own wrote arguments that its schema does not mark.

        What was computed from the old contents can still be rebuilt, unless they had to be read again: that is an error
        when backward asks, this once.
        """
        if changed:
            learn_undeclared_writes(func, [place for place, _ in changed])
        self._forget_contents([tensor for _, tensor in changed])

    def _forget_contents(self, changed: Sequence[_Tensor]) -> None:
        """Forget what tensors held that were written unseen."""
        for tensor in changed:
            old = self._current.pop(storage_key(tensor), None)
            if old is None:
                continue
            if old.handles:
                old.live = alias(tensor)
            if old.source is not None:
                old.source = old.op = None

    def _register(self, op: TapedOp | None, info: OpInfo, mutated: list[_Tensor], result: Any) -> None:
        if op is None:
            # What it made is unknown to the tape: seen again, it is external. Written storages were forgotten above.
            return
        current = self._current
        written = {storage_key(tensor): tensor for tensor in mutated}
        for index, (key, tensor) in enumerate(written.items()):
            self._new_value(op, key, tensor, -1 - index)
        for index, tensor in enumerate(result_tensors(result)):
            if not isinstance(tensor, _Tensor) or tensor.layout is not torch.strided:
                continue
            key = storage_key(tensor)
            if key in written or current.get(key) in op.inputs:
                continue  # an alias of an argument (declared or, like _unsafe_view, not)
            self._new_value(op, key, tensor, index).uninitialised = info.is_uninitialised

    def _new_value(self, op: TapedOp, key: int, tensor: _Tensor, output: int) -> TapedValue:
        value = TapedValue(WeakStorage(tensor), tensor.untyped_storage().nbytes())
        value.op = op
        value.output = output
        op.outputs.append(value)
        self._current[key] = value
        if self.check is not None:
            self.check.remember(value, tensor)
        return value

    def pack(self, tensor: _Tensor) -> Any:
        """Return what autograd shall hold instead of a tensor that it saves."""
        value = None
        if type(tensor) is not _Tensor and wraps(tensor) and not isinstance(tensor, torch.nn.Parameter):
            parts = held_as_parts(tensor, self.pack_if_dropped)
            return Kept(tensor) if parts is None else TakenApart(tensor, parts)
        if type(tensor) is _Tensor and tensor.layout is torch.strided and not is_conj_or_neg(tensor):
            value = self._current.get(storage_key(tensor))
        if value is None or value.op is None or value.uninitialised or storage_key(tensor) in self._split:
            return Kept(tensor)
        if self.check is not None and not self.check.unchanged(value, tensor):
            del self._current[storage_key(tensor)]
            return Kept(tensor)
        if not value.op.region.drops(value):
            return Kept(tensor)
        # Replay runs on the stream of the node that reads, which is right only if the region used one stream.
        if not self._streams.is_same(tensor) or not can_rebuild(value):
            self.statistics.kept_unsafe += 1
            return Kept(tensor)
        with self.lock:
            self._demand(value)
            value.handles += 1
            value.last_leaf = self._leaf
        if self.check is not None:
            self.check.dropped(value, tensor)
        self.statistics.dropped_slots += 1
        return Handle(self, Ref(value, tensor), tensor, self._leaf)

    def pack_if_dropped(self, tensor: _Tensor) -> Handle | None:
        """Return what to hold instead of a tensor; None: the tensor itself."""
        packed = CurrentValues.pack(self, tensor)
        return packed if type(packed) is Handle else None

    def seal(self) -> None:
        """End the tape's last region: let go of everything that no handle needs."""
        self._alone(self._let_go)

    def _let_go(self) -> None:
        self._give_back(self._released or [])
        self._released = None
        self.interrupted = None
        movable = set(self._movable)
        for value in self._held:
            if value.refs == 0:
                value.source = None
            elif value.source is not None:
                if self.check is None and value in movable and value.mark is None:
                    value.source = copy_of_storage(value.source)  # which is small
                value.version = version_of(value.source)
                if self._is_changed(value):  # what needs the old contents cannot be rebuilt; reading it says so
                    value.source = value.op = None
                else:
                    self._writes.add(storage_key(value.source), value, self)
        for key, value in self._current.items():
            if value.handles:
                self._writes.add(key, value, self)
        for op in self._ops:
            if not op.demanded:
                self._forget(op)
        self._held = []
        self._movable = []
        self._ops = []
        self._current = {}
        self._split = {}
        self._region = None
