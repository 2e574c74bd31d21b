"""The tape of one region: what ran, and how to run part of it again.

Forward
-------
Every operation that the plan needs for replay is written down with its arguments as *values seen through a geometry*:
a value is what one storage holds between two writes, so views cost nothing and an in-place operation makes a new value.
A value is a *source* if the tape holds it (made outside the region, in the plan's keep set, or not replayable), else it
is rebuilt.  When autograd saves a value that the plan drops, it gets a `Handle` instead, and every operation that
rebuilding needs gets one reference on each of its inputs.

Backward
--------
Reading a handle runs the missing operations, oldest first, below autograd; results that somebody still refers to are
memoised.  Releasing a handle, or having run an operation, gives the references back, and what reaches zero is freed.
So each operation runs at most once, and memory falls as backward goes on.  `recollect.simulate` counts exactly this.

Invariants
----------
* The live tape decides what is safe; the plan is only a hint about what is worth dropping.
* A source written after it was recorded is noticed: inside the region because the write is seen (the old contents are
  copied first if something needs them), later by its version counter (then replay refuses).
* Blind spots: a write that neither goes through the dispatcher nor moves a version counter.  The calibrating first call
  of each region compares checksums to find such writes; see `calibration`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from recollect._torch_private import (
    WeakStorage,
    alias,
    below_autograd,
    is_conj_or_neg,
    set_grad_enabled_quietly,
    storage_key,
    with_lazy_bits,
)
from recollect.replay import safety
from recollect.replay.calibration import Calibrator
from recollect.replay.ops import OpInfo, mutated_tensors, result_tensors, tensors_in
from recollect.replay.recipe import LiveRecipe
from recollect.replay.statistics import Statistics

_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter
_Noted = (torch.Tensor, list, tuple)


class TapedValue:
    """What one storage holds between two writes."""

    __slots__ = ("address", "handles", "memo", "nbytes", "op", "output", "refs", "source", "uninitialised", "version")

    def __init__(self, address: WeakStorage, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.op: TapedOp | None = None
        self.output = 0
        self.source: _Tensor | None = None  # held alias
        self.version: int | None = None  # the source's version when the region ended
        self.memo: torch.UntypedStorage | None = None  # replayed contents
        self.refs = 0  # handles, and operations not yet replayed, that want it
        self.handles = 0  # of those, the handles
        self.uninitialised = False


class Ref:
    """A tensor argument or saved tensor: a value through a geometry."""

    __slots__ = ("dtype", "lazy", "offset", "size", "stride", "value")

    def __init__(self, value: TapedValue, tensor: _Tensor) -> None:
        self.value = value
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.dtype = tensor.dtype
        self.lazy = tensor.is_conj(), tensor.is_neg()

    def build(self, storage: torch.UntypedStorage) -> _Tensor:
        """A tensor of this geometry on `storage`."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload]
        return with_lazy_bits(tensor, *self.lazy) if True in self.lazy else tensor


class TapedOp:
    """One operation that can be run again."""

    __slots__ = ("args", "demanded", "done", "func", "generator", "grad", "info", "inputs", "kwargs", "outputs",
                 "position", "random_state")  # fmt: skip

    def __init__(self, position: int, func: Any, info: OpInfo) -> None:
        self.position = position
        self.func = func
        self.info = info
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.inputs: tuple[TapedValue, ...] = ()  # each once
        self.outputs: list[TapedValue] = []
        self.demanded = False
        self.done = False
        self.grad = False
        self.generator: torch.Generator | None = None
        self.random_state: _Tensor | None = None

    def forget(self) -> None:
        """Break reference cycles: the operation will not run (again)."""
        self.done = True
        self.inputs = ()
        self.outputs = []
        self.args = ()
        self.kwargs = {}
        self.random_state = None


class Handle:
    """What autograd holds instead of a dropped tensor."""

    __slots__ = ("ref", "tape")

    def __init__(self, tape: Tape, ref: Ref) -> None:
        self.tape = tape
        self.ref = ref

    def __del__(self) -> None:
        self.tape.release(self.ref.value)


class Kept:
    """A saved tensor that stays, with the version that plain autograd would have checked."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: _Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def read(self) -> _Tensor:
        """The tensor; raises as plain autograd does if it was written after being saved."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {list(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead. Plain PyTorch refuses this too: do not modify a tensor in place after a "
                "differentiable operation used it."
            )
        return self.tensor


class Tape:
    """Records one region call and replays parts of it.  Forward is one thread's; replay may be any thread's."""

    def __init__(
        self, recipe: LiveRecipe | None, statistics: Statistics, refused: set[int], calibrator: Calibrator | None = None
    ) -> None:
        self._recipe = recipe
        self._on_plan = recipe is not None
        self._statistics = statistics
        self._refused = refused
        self._calibrator = calibrator
        self._position = 0
        self._current: dict[int, TapedValue] = {}  # storage address -> what it holds now
        self._held: list[TapedValue] = []  # sources taken while recording
        self._ops: list[TapedOp] = []
        self._streams: dict[int, int] = {}
        self._lock = threading.RLock()

    # ------------------------------------------------------------------------------------------------ forward

    def dispatch(
        self, func: Any, info: OpInfo, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one (non-view) operation of the region and note what it does."""
        position = self._position
        self._position = position + 1
        recipe = self._recipe
        record = True
        if self._on_plan:
            assert recipe is not None
            if position < recipe.length and recipe.funcs[position] is func:
                record = recipe.record[position]
            else:
                self._on_plan = False
                self._statistics.mismatches += 1
        if position in self._refused:
            record = False
        op = self._record(position, func, info, types, args, kwargs) if record else None
        calibrator = self._calibrator
        if calibrator is not None and op is not None:
            calibrator.before(op, args, kwargs)
        mutated = mutated_tensors(info, args, kwargs) if info.mutates else []
        for tensor in mutated:
            self.about_to_write(tensor)
        result = func(*args, **kwargs)
        self._register(op, info, mutated, result)
        if calibrator is not None and op is not None and not calibrator.after(op, args, kwargs, result):
            self._statistics.refused_ops += 1
            self._current = {key: value for key, value in self._current.items() if value.op is not op}
        return result

    def _record(
        self,
        position: int,
        func: Any,
        info: OpInfo,
        types: Sequence[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> TapedOp | None:
        tensors = tensors_in(args)
        if kwargs:
            tensors += tensors_in(kwargs.values())
        device = safety.call_device(tensors, kwargs)
        if safety.blocker(info, types, tensors, device.type):
            return None
        op = TapedOp(position, func, info)
        op.grad = torch.is_grad_enabled()
        if info.is_random:
            op.generator = safety.call_generator(args, kwargs, device)
            if op.generator is None:
                return None
            op.random_state = op.generator.get_state()
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
        """An argument with tensors replaced by references to values; values that are sources get held."""
        if isinstance(argument, _Tensor):
            value = self._sight(argument)
            if value.source is None and (value.op is None or self._is_kept(value)) and not value.uninitialised:
                value.source = alias(argument)
                self._held.append(value)
            inputs[value] = None
            return Ref(value, argument)
        if isinstance(argument, list | tuple):
            return type(argument)(self._note(a, inputs) for a in argument)
        return argument

    def _is_kept(self, value: TapedValue) -> bool:
        op = value.op
        return (
            self._on_plan
            and op is not None
            and self._recipe is not None
            and (op.position, value.output) in self._recipe.keep
        )

    def _sight(self, tensor: _Tensor) -> TapedValue:
        """The value that a tensor's storage holds now; what the region did not make is external."""
        key = storage_key(tensor)
        value = self._current.get(key)
        if value is not None and self._calibrator is not None and not self._calibrator.unchanged(value, tensor):
            value = None  # something wrote into it behind the dispatcher's back
        if value is None:
            value = TapedValue(WeakStorage(tensor), tensor.untyped_storage().nbytes())
            self._current[key] = value
        return value

    def about_to_write(self, tensor: _Tensor) -> None:
        """The contents of the tensor's storage are about to change."""
        key = storage_key(tensor)
        old = self._current.pop(key, None)
        if old is None:
            return
        if old.handles and old.source is None and old.memo is None:
            # Saved, dropped, and now written. Plain autograd refuses this, or (through .data) reads the new contents;
            # replay would give the old ones. The plan keeps values that it saw written later, so this is a surprise.
            self._statistics.written_after_drop += 1
            old.op = None
        if old.source is None:
            return
        if old.refs:  # somebody will need the old contents
            old.source = _copy_of_storage(old.source)
            old.version = old.source._version
        else:
            old.source = None

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
        if self._calibrator is not None:
            self._calibrator.remember(value, tensor)
        return value

    def pack(self, tensor: _Tensor) -> Any:
        """Autograd saves `tensor`: what it shall hold instead."""
        if type(tensor) is _Parameter:
            return tensor
        value = None
        if type(tensor) is _Tensor and tensor.layout is torch.strided and not is_conj_or_neg(tensor):
            value = self._current.get(storage_key(tensor))
        if value is None or value.op is None or value.uninitialised:
            return Kept(tensor)
        if self._calibrator is not None and not self._calibrator.unchanged(value, tensor):
            del self._current[storage_key(tensor)]
            return Kept(tensor)
        if self._on_plan:
            assert self._recipe is not None
            if (value.op.position, value.output) not in self._recipe.drop:
                return Kept(tensor)
        if not self._same_stream(tensor) or not _can_rebuild(value):
            self._statistics.kept_unsafe += 1
            return Kept(tensor)
        with self._lock:
            _demand(value)
            value.handles += 1
        self._statistics.dropped_slots += 1
        return Handle(self, Ref(value, tensor))

    def _same_stream(self, tensor: _Tensor) -> bool:
        """Replay runs on the stream of the node that reads, which is right only if the region used one stream."""
        if tensor.device.type != "cuda":
            return True
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        return self._streams.setdefault(tensor.device.index, stream) == stream

    def seal(self) -> None:
        """The region ended: let go of everything that no handle needs."""
        with self._lock:
            for value in self._held:
                if value.refs == 0:
                    value.source = None
                elif value.source is not None:
                    value.version = value.source._version
            for op in self._ops:
                if not op.demanded:
                    op.forget()
            self._held = []
            self._ops = []
            self._current = {}
            self._recipe = None
            self._calibrator = None

    # ------------------------------------------------------------------------------------------------ backward

    def read(self, handle: Handle) -> _Tensor:
        """The dropped tensor, rebuilt."""
        with self._lock, below_autograd():
            return handle.ref.build(self._need(handle.ref.value))

    def release(self, value: TapedValue) -> None:
        """A handle died."""
        with self._lock:
            value.handles -= 1
            _unref([value])

    def _need(self, wanted: TapedValue) -> torch.UntypedStorage:
        storage = _contents(wanted)
        if storage is not None:
            return storage
        todo: dict[int, TapedOp] = {}
        stack = [wanted]
        while stack:
            value = stack.pop()
            if value.memo is None and value.source is None:
                op = value.op
                if op is None or op.done:
                    raise RuntimeError(
                        "recollect cannot rebuild a saved tensor: it was changed after autograd saved it (for example "
                        "through .data), which the plan did not know. Measure the model again, or keep this part out "
                        "of the plan."
                    )
                if op.position not in todo:
                    todo[op.position] = op
                    stack.extend(op.inputs)
        for position in sorted(todo):
            self._run(todo[position])
        storage = _contents(wanted)
        assert storage is not None
        return storage

    def _run(self, op: TapedOp) -> None:
        self._statistics.replayed_ops += 1
        storages: dict[TapedValue, torch.UntypedStorage] = {}
        written = _written_refs(op)
        for value in op.inputs:
            contents = _contents(value)
            assert contents is not None
            if value in written:
                if value.memo is not None and value.refs == 1:
                    value.memo = None  # only this operation wants it: write in place
                else:
                    contents = contents.clone()
            storages[value] = contents

        args = [_rebuild(a, storages) for a in op.args]
        kwargs = {name: _rebuild(a, storages) for name, a in op.kwargs.items()}
        if op.info.undeclared_writes and args[op.info.training_flag]:
            for position in op.info.undeclared_writes:
                args[position] = None  # running statistics were updated in forward, once
        set_grad_enabled_quietly(op.grad)
        if op.random_state is not None:
            assert op.generator is not None
            now = op.generator.get_state()
            op.generator.set_state(op.random_state)
            try:
                result = op.func(*args, **kwargs)
            finally:
                op.generator.set_state(now)
        else:
            result = op.func(*args, **kwargs)
        results = result_tensors(result)
        written_values = list(written)
        for value in op.outputs:
            if value.refs == 0 or value.source is not None:
                continue
            if value.output >= 0:
                storage = results[value.output].untyped_storage()
            else:
                storage = storages[written_values[-1 - value.output]]
            if storage.nbytes() != value.nbytes:
                raise RuntimeError(
                    f"replaying {op.info.name} gave a storage of {storage.nbytes()} bytes instead of {value.nbytes}: "
                    "the operation is not a function of its inputs. Please report this operation."
                )
            value.memo = storage
        inputs = list(op.inputs)
        op.forget()
        _unref(inputs)


def _contents(value: TapedValue) -> torch.UntypedStorage | None:
    if value.memo is not None:
        return value.memo
    source = value.source
    if source is None:
        return None
    if value.version is not None and source._version != value.version:
        raise RuntimeError(
            "recollect cannot rebuild a saved tensor: a tensor that its recomputation reads "
            f"({source.dtype} {list(source.shape)}) was modified in place after the region that used it ended. Gradients "
            "would be wrong. Do not modify it before backward, or keep this region out of the plan."
        )
    return source.untyped_storage()


def _can_rebuild(wanted: TapedValue) -> bool:
    """Every operation that rebuilding needs is on the tape, and every leaf is held."""
    seen: set[TapedValue] = set()
    stack = [wanted]
    while stack:
        value = stack.pop()
        if value in seen or value.refs:  # already demanded, hence already proved
            continue
        seen.add(value)
        if value.source is not None:
            continue
        if value.op is None or (value.op.done and value.memo is None):
            return False
        stack.extend(value.op.inputs)
    return True


def _demand(wanted: TapedValue) -> None:
    stack = [wanted]
    while stack:
        value = stack.pop()
        value.refs += 1
        op = value.op
        if value.refs == 1 and value.source is None and op is not None and not op.demanded:
            op.demanded = True
            stack.extend(op.inputs)


def _unref(values: list[TapedValue]) -> None:
    stack = values
    while stack:
        value = stack.pop()
        value.refs -= 1
        if value.refs:
            continue
        value.memo = None
        value.source = None
        op = value.op
        if op is not None and op.demanded and not op.done and all(output.refs == 0 for output in op.outputs):
            stack.extend(op.inputs)
            op.forget()


def _written_refs(op: TapedOp) -> dict[TapedValue, None]:
    """Values that the operation writes, in argument order."""
    written: dict[TapedValue, None] = {}
    for position, name in op.info.mutates:
        argument = op.args[position] if position < len(op.args) else op.kwargs.get(name)
        for ref in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(ref, Ref):
                written[ref.value] = None
    return written


def _rebuild(argument: Any, storages: dict[TapedValue, torch.UntypedStorage]) -> Any:
    if isinstance(argument, Ref):
        return argument.build(storages[argument.value])
    if isinstance(argument, list | tuple):
        return type(argument)(_rebuild(a, storages) for a in argument)
    return argument


def _copy_of_storage(tensor: _Tensor) -> _Tensor:
    """A tensor of the same geometry on a copy of the whole storage."""
    with below_autograd():
        storage = tensor.untyped_storage().clone()
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload]
        return copy
