"""Record a region, or several that follow each other, on a tape, so that parts of it can be replayed.

Every operation that the plan needs for replay is written down with its arguments as *values seen through a geometry*:
a value is what one storage holds between two writes, so views cost nothing and an in-place operation makes a new value.
A value is a *source* if the tape holds it (made outside the region, kept by the plan, or not replayable), else it is
rebuilt.  When autograd saves a value that the plan drops, it gets a `Handle` instead, and every operation that
rebuilding needs gets one reference on each of its inputs.

Invariants
----------
* The live tape decides what is safe; the plan is only a hint about what is worth dropping.
* A source written after it was recorded is noticed: inside this region or a later one because the write is seen (the
  old contents are copied first if something needs them), elsewhere by its version counter (then replay refuses).
* A dropped tensor that is written afterwards is read as plain autograd reads it: refused if its version moved, else
  with the new contents.
* Blind spots: a write that neither goes through the dispatcher, nor moves a version counter, nor comes from memory that
  was seen to be handed out (`tightfit.operators.escaped_memory`).  The self-check, at the first call of each region,
  compares checksums to find such writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tightfit._torch_private import (
    WeakStorage,
    alias,
    is_conj_or_neg,
    library_switches,
    storage_key,
    version_of,
)
from tightfit.device import device_for
from tightfit.device.placement import StreamWatch, device_of_call, generators_of
from tightfit.operators import replayable as safety
from tightfit.operators.facts import (
    OpInfo,
    learn_undeclared_writes,
    mutated_tensors,
    result_tensors,
    setting_up,
    tensors_in,
    undeclared_writes,
)
from tightfit.operators.opaque_calls import OpaqueCall, OperatorCall
from tightfit.records.recompute_tree import RecomputeTree
from tightfit.replay.contents import mark_of
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.repeats import Repeats
from tightfit.replay.replayer import Handle, Replayer
from tightfit.replay.self_check import SelfCheck
from tightfit.replay.statistics import Statistics
from tightfit.replay.values import (
    Kept,
    Ref,
    TapedOp,
    TapedRegion,
    TapedValue,
    before_write,
    belongs_to_others,
    can_rebuild,
    copy_of_storage,
    may_be_statistics,
)
from tightfit.replay.write_watch import WriteWatch

_Tensor = torch.Tensor
_Noted = (torch.Tensor, list, tuple)


class Tape(Replayer):
    """Records one region call, or several that follow each other, and replays parts of it.

    Forward is one thread's; replay may be any thread's.
    """

    def __init__(
        self,
        statistics: Statistics,
        writes: WriteWatch,
        tree: RecomputeTree | None = None,
        check: SelfCheck | None = None,
        repeats: Repeats | None = None,
    ) -> None:
        super().__init__(statistics, tree, check)
        self._repeats = repeats
        self._writes = writes
        self._region: TapedRegion | None = None
        self._place = 0  # of the region among the tape's
        self._position = 0  # of the next operation in it
        self._leaf = 0  # of the next operation
        self._current: dict[int, TapedValue] = {}  # storage address -> what it holds now
        self._held: list[TapedValue] = []  # sources taken while recording
        self._movable: list[TapedValue] = []  # of those, what may be running statistics, not copied yet
        self._ops: list[TapedOp] = []
        # Storages whose parts have version counters of their own. Their addresses stay reserved: what came
        # to lie at one later would be taken for such a part, and kept.
        self._split: dict[int, WeakStorage] = {}
        self._streams = StreamWatch()
        self._switches: tuple[Any, ...] = ()  # of libraries, as the last operation found them

    @property
    def is_self_checking(self) -> bool:
        """Whether its operations are checked as they run."""
        return self._check is not None

    @property
    def left_its_plan(self) -> bool:
        """Whether the running region has a plan and ran other operations."""
        region = self._region
        return region is not None and region.recipe is not None and not region.on_plan

    def begin_region(self, recipe: ResolvedRecipe | None, refused: set[int], *, keeps_rest: bool = False) -> None:
        """Begin a region call that follows a recipe (None: what is provably replayable is dropped).

        `keeps_rest`: once its operations are not the recipe's, everything is kept.
        """
        self._region = TapedRegion(recipe, refused, keeps_rest)
        self._switches = library_switches()
        self._place = recipe.place if recipe is not None else 0
        self._go_to(0)

    def _go_to(self, position: int) -> None:
        self._position = position
        if self._tree is not None:
            self._leaf = self._tree.leaf_at(self._place, position)

    def passes(self, func: Any) -> bool:
        """Return whether the plan has no use for the operation that comes now; if so, the tape is past it.

        For operations that change nothing the tape knows (`OpInfo.is_quiet`).  What it makes is unknown to the tape and
        external when it is seen again, as with any operation that is not written down.  Its results cannot be taken for
        a value of the tape: every such value reserves the address of its storage.
        """
        region = self._region
        if self._tree is not None or self._check is not None or region is None or not region.on_plan:
            return False
        recipe = region.recipe
        if recipe is None or recipe.passes[self._position] is not func:
            return False
        self._position += 1
        return True

    def is_set_up_by(self, info: OpInfo) -> bool:
        """Return whether an operation is done once for the one that the plan has next, and is no part of the step."""
        recipe = self._region.recipe if self._region is not None and self._region.on_plan else None
        if recipe is None or self._position >= recipe.length:
            return False
        return info.name in setting_up(recipe.funcs[self._position])

    def passed_one_that_failed(self) -> None:
        """Take back the last `passes`: measuring does not count an operation that fails, either."""
        self._position -= 1

    def dispatch(
        self, func: Any, info: OpInfo, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one (non-view) operation of the region and note what it does."""
        position = self._position
        region = self._region
        assert region is not None
        held_count = len(self._held)
        record, left_with = self._follow_plan(region, func)
        if position in region.refused:
            record = False
        op = self._record(region, func, info, types, args, kwargs) if record else None
        check = self._check
        if check is not None and op is not None:
            check.note_reads(op)
        repeat = None
        if op is not None and info.may_differ and self._repeats is not None:
            repeat = self._repeats.begin(op, args, kwargs)
        mutated = mutated_tensors(info, args, kwargs) if info.mutates else []
        for tensor in mutated:
            self.about_to_write(tensor)
        if info.undeclared_writes:
            for tensor in undeclared_writes(info, args):
                self.about_to_write(tensor)
        watched = check.look_at(info, args) if check is not None and op is None and info.is_foreign else []
        try:
            result = func(*args, **kwargs)
        except BaseException:
            self._forget_failed(region, op, held_count, left_with)
            raise
        if check is not None and watched:
            self._written_unseen(func, check.changed_since(watched))
        if info.splits_silently:
            self._split[storage_key(args[0])] = WeakStorage(args[0])
        self._register(op, info, mutated, result)
        if op is not None and isinstance(op.func, OpaqueCall):
            op.func.done()
        if op is not None and repeat is not None and not repeat.agrees(result):
            if info.is_foreign:
                written = {id(tensor) for tensor in repeat.changed_inputs()}
                places = [(n, t) for n, a in enumerate(args) for t in tensors_in((a,)) if id(t) in written]
                self._written_unseen(func, places)
            region.refused.add(position)
            self._statistics.refused_ops += 1
            self._current = {key: value for key, value in self._current.items() if value.op is not op}
        self._go_to(position + 1)
        return result

    def _follow_plan(
        self, region: TapedRegion, func: Any
    ) -> tuple[bool, list[tuple[TapedValue, _Tensor | None]] | None]:
        """Return whether the operation that comes now may have to be replayed; leave the plan if it has another there,
        and return then what may be running statistics.
        """
        recipe = region.recipe
        if not region.on_plan or recipe is None:
            return True, None
        position = self._position
        if position < recipe.length and recipe.funcs[position] is func:
            return recipe.record[position], None
        region.on_plan = False
        self._statistics.mismatches += 1
        left_with = [(value, value.source) for value in self._movable]
        self._copy_movable()
        return True, left_with

    def _forget_failed(
        self,
        region: TapedRegion,
        op: TapedOp | None,
        held_count: int,
        left_with: list[tuple[TapedValue, _Tensor | None]] | None,
    ) -> None:
        """Go on as if the operation had not been tried: a step that catches the error goes on by its plan.

        `held_count`: sources held before it. `left_with`: what may be running statistics, if it was not the plan's.
        """
        if op is not None:
            self._ops.pop()
            self._statistics.taped_ops -= 1
            for value in self._held[held_count:]:
                value.source = None
            self._movable = [value for value in self._movable if value.source is not None]
            del self._held[held_count:]
        if left_with is not None:
            region.on_plan = True
            self._statistics.mismatches -= 1
            for value, source in left_with:
                value.source = source
                self._movable.append(value)

    def _record(
        self,
        region: TapedRegion,
        func: Any,
        info: OpInfo,
        types: Sequence[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> TapedOp | None:
        tensors = tensors_in(args)
        if kwargs:
            tensors += tensors_in(kwargs.values())
        device = device_of_call(tensors, kwargs)
        if safety.blocker(info, types, args, kwargs, tensors, device):
            return None
        exposed = self._writes.exposed
        if exposed and any(storage_key(tensor) in exposed for tensor in tensors):
            return None
        if info.is_foreign and not isinstance(func, OpaqueCall):
            func = OperatorCall(func, device, generators_of(tensors))
        op = TapedOp(region, self._position, len(self._ops), self._leaf, func, info)
        op.grad = torch.is_grad_enabled()
        if info.uses_libraries:
            now = library_switches()
            if now != self._switches:
                self._switches = now
        op.switches = self._switches
        if info.is_random:
            op.generator = safety.call_generator(args, kwargs, device)
            if op.generator is None:
                return None
            op.random_state = op.generator.get_state()
        if info.undeclared_writes and info.training_flag >= 0 and args[info.training_flag]:
            # Running statistics are updated in forward, once: replay gets None in their place.
            args = tuple(None if place in info.undeclared_writes else a for place, a in enumerate(args))
        inputs: dict[TapedValue, None] = {}
        for tensor in tensors:
            value = self._current.get(storage_key(tensor))
            if value is not None and value.uninitialised:
                whole = tensor is args[0] and tensor.numel() * tensor.itemsize == value.nbytes
                if not (info.is_full_writer and whole):
                    return None
        op.args = tuple([self._note(a, inputs) if isinstance(a, _Noted) else a for a in args])
        if kwargs:
            op.kwargs = {name: self._note(a, inputs) if isinstance(a, _Noted) else a for name, a in kwargs.items()}
        op.inputs = tuple(inputs)
        self._ops.append(op)
        self._statistics.taped_ops += 1
        return op

    def _note(self, argument: Any, inputs: dict[TapedValue, None]) -> Any:
        """Replace the tensors of an argument by references to values; values that are sources get held."""
        if isinstance(argument, _Tensor):
            value = self._sight(argument)
            value.last_leaf = self._leaf
            kept = value.op is None or value.op.region.keeps(value)
            if kept and value.source is None and not value.uninitialised:
                value.source = alias(argument)
                self._held.append(value)
                if may_be_statistics(argument):
                    self._movable.append(value)
                    if self._region is None or not self._region.on_plan:
                        self._copy_movable()
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
        if value is not None and self._check is not None and not self._check.unchanged(value, tensor):
            value = None  # something wrote into it behind the dispatcher's back
        if value is None:
            value = TapedValue(WeakStorage(tensor), tensor.untyped_storage().nbytes())
            self._current[key] = value
            if self._check is not None:
                self._check.remember(value, tensor)
        return value

    def about_to_write(self, tensor: _Tensor) -> None:
        """Note that the contents of the tensor's storage are about to change."""
        key = storage_key(tensor)
        old = self._current.pop(key, None)
        if old is None:
            return
        if old.handles and old.live is None:
            self._statistics.written_after_drop += 1  # the plan keeps what it saw written: this is a surprise
        with self._lock:
            before_write(old, tensor)

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
        if self._check is not None:
            self._check.remember(value, tensor)
        return value

    def pack(self, tensor: _Tensor) -> Any:
        """Return what autograd shall hold instead of a tensor that it saves."""
        value = None
        if type(tensor) is _Tensor and tensor.layout is torch.strided and not is_conj_or_neg(tensor):
            value = self._current.get(storage_key(tensor))
        if value is None or value.op is None or value.uninitialised or storage_key(tensor) in self._split:
            return Kept(tensor)
        if self._check is not None and not self._check.unchanged(value, tensor):
            del self._current[storage_key(tensor)]
            return Kept(tensor)
        if not value.op.region.drops(value):
            return Kept(tensor)
        # Replay runs on the stream of the node that reads, which is right only if the region used one stream.
        if not self._streams.is_same(tensor) or not can_rebuild(value):
            self._statistics.kept_unsafe += 1
            return Kept(tensor)
        with self._lock:
            self._demand(value)
            value.handles += 1
            value.last_leaf = self._leaf
        if self._check is not None:
            self._check.dropped(value, tensor)
        self._statistics.dropped_slots += 1
        return Handle(self, Ref(value, tensor), tensor, self._leaf)

    def seal(self) -> None:
        """End the tape's last region: let go of everything that no handle needs."""
        with self._lock:
            self._give_back(self._released or [])
            self._released = None
            movable = set(self._movable)
            for value in self._held:
                if value.refs == 0:
                    value.source = None
                elif value.source is not None:
                    value.version = version_of(value.source)
                    if self._check is None and (value in movable or belongs_to_others(value.source)):
                        if device_for(value.source).is_host:
                            value.mark = mark_of(value.source)
                        else:  # to read a mark would be to wait for the device; what it is of is small
                            value.source = copy_of_storage(value.source)
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
