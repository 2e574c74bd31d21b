"""Watches one training step and writes down what happens to memory.

Works on fake tensors (shapes without data) and on real ones.  Autograd's savings are taken away while watching: a saved
tensor is replaced by a note of its geometry (for real tensors its bytes go to a file), so that the death of a storage
shows when its last *other* reference died; the note's own death shows when autograd lets go.  From both follow the
lifetimes in the plain step and in any plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from recollect._torch_private import (
    DispatchMode,
    WeakStorage,
    current_graph_node,
    current_graph_task,
    is_conj_or_neg,
    is_view,
    storage_key,
)
from recollect.distributed_tensors import is_distributed
from recollect.measure.layouts import Layouts, laid_out, layouts_of
from recollect.measure.signatures import SignatureTable
from recollect.records import Event, EventKind
from recollect.replay import safety
from recollect.replay.ops import OpInfo, describe, mutated_tensors, result_tensors, tensors_in, undeclared_writes


@dataclass(slots=True)
class RawStorage:
    """A piece of memory as observed."""

    nbytes: int
    component: str
    current: int = -1
    """Index of the value that it holds now."""


@dataclass(slots=True)
class RawValue:
    """Contents between two writes."""

    storage: int
    op: int = -1
    output: int = 0
    overwritten: bool = False


@dataclass(slots=True)
class RawOp:
    """One operation of forward."""

    name: str
    signature: int
    inputs: tuple[int, ...]
    mutates: tuple[int, ...]
    keep_reason: str
    random_state_bytes: int
    outputs: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ModuleEvent:
    """A module call began (`path` set) or ended (`path` None)."""

    path: str | None
    has_plain_arguments: bool = False
    """It was called with tensors and constants only."""


@dataclass(slots=True)
class Observation:
    """Everything that was seen, in order."""

    storages: list[RawStorage] = field(default_factory=list)
    values: list[RawValue] = field(default_factory=list)
    ops: list[RawOp] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """The value of each slot."""
    events: list[Event | ModuleEvent] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Sum:
    """Autograd's engine has just added a second gradient of one value to the first."""

    since: int
    """Index of the first event that belongs to it."""
    old: int
    """Storage of the first gradient."""
    new: int
    """Storage of the sum."""
    key: int
    """Where the sum's storage is."""


class _Note:
    """What autograd holds instead of a saved tensor while watching."""

    __slots__ = ("contents", "device", "dtype", "nbytes", "offset", "on_release", "size", "slot", "stride")

    def __init__(self, slot: int, tensor: torch.Tensor, contents: Any, on_release: Callable[[int], None]) -> None:
        self.slot = slot
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.nbytes = tensor.untyped_storage().nbytes()
        self.contents = contents
        self.on_release = on_release

    def __del__(self) -> None:
        self.on_release(self.slot)


class Observer(DispatchMode):
    """See the module.  `device_type` is the device whose memory counts."""

    def __init__(
        self,
        signatures: SignatureTable,
        device_type: str,
        spill: Callable[[torch.Tensor], Any] | None = None,
        unspill: Callable[[Any], torch.UntypedStorage] | None = None,
        layouts: Mapping[str, Layouts] | None = None,
    ) -> None:
        """`layouts`: how the results of some operations really lie in memory, by the signature's key."""
        super().__init__()
        self.seen = Observation()
        self.in_optimizer = False
        self._in_backward = False
        self._quiet = 0
        self._beside = 0
        self._gathered: dict[int, int] = {}  # of tensors that come and go in place: what they hold now
        self._busy = False  # inside our own code, which asks for storages, too
        self._exposed: set[int] = set()  # storages whose memory was handed out
        self._signatures = signatures
        self._device_type = device_type
        self.random_state_bytes = torch.default_generator.get_state().numel() if device_type == "cpu" else 0
        """Of the default generator, where that counts; a CUDA generator's state is a few bytes of host memory."""
        self.margin_bytes = 0
        """What a step may take beyond what is seen here."""
        self._spill = spill
        self._unspill = unspill
        self._corrections = layouts or {}
        self.layouts: dict[str, Layouts] = {}
        """How the results of each signature lay, by its key."""
        self._storage_of: dict[int, int] = {}
        self._watches: dict[int, tuple[weakref.ref[Any], WeakStorage]] = {}
        self._borrowed: dict[int, int] = {}  # slot -> notes and rebuilt tensors that still stand for it
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._watching = False
        self._graph_task = -1
        self._in_engine = False
        """The running node's own operations are done: what comes now is autograd's engine adding up gradients."""
        self._sum: _Sum | None = None
        self._instead_of: dict[int, int] = {}  # storage of a sum -> the storage that holds it in a real step

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # As for `replay.session.Session`: without it every operation pays for a wrapper that only torch.compile needs.
        return False

    # ------------------------------------------------------------------------------------------------ the caller's side

    def add_baseline(self, tensor: torch.Tensor, component: str) -> None:
        """Count the tensor's storage as alive during the whole step."""
        if self._counts(tensor) and storage_key(tensor) not in self._storage_of:
            self._new_storage(tensor, component)

    def start(self) -> None:
        """Begin to watch."""
        self._hooks.__enter__()
        self.put_on()
        self._watching = True

    def stop(self) -> None:
        """End watching."""
        self._settle_sum()
        self._watching = False
        self.take_off()
        self._hooks.__exit__(None, None, None)

    @contextmanager
    def beside_the_step(self) -> Iterator[None]:
        """Operations inside are not the model's, and a plan has nothing to do with them, but their memory counts."""
        self._beside += 1
        try:
            yield
        finally:
            self._beside -= 1

    def add_resizable(self, tensor: torch.Tensor) -> None:
        """A tensor without memory, which will get some and give it back (see `resized`).  What it holds is, for the
        model, a parameter that is always there.
        """
        assert tensor.untyped_storage().nbytes() == 0
        self.add_baseline(tensor, "parameters")

    def resized(self, tensor: torch.Tensor) -> None:
        """The tensor has got memory, or given it back."""
        if not self._watching:
            return
        key = storage_key(tensor)
        nbytes = round_up(tensor.untyped_storage().nbytes(), self._device_type)
        if key in self._gathered and nbytes == 0:
            self._emit(EventKind.FREE, self._gathered.pop(key))
        elif key not in self._gathered and nbytes:
            self._gathered[key] = index = len(self.seen.storages)
            self.seen.values.append(RawValue(storage=index))
            self.seen.storages.append(
                RawStorage(nbytes=nbytes, component="activation", current=len(self.seen.values) - 1)
            )
            self._emit(EventKind.ALLOC, index)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Operations inside are not noted, but see what an observed run sees (an optimizer's step counter)."""
        with self:
            yield

    def expose(self, tensor: torch.Tensor) -> None:
        """The tensor's memory is handed out: from now on it may be written at any moment, unseen."""
        forward = self._watching and not (self._in_backward or self.in_optimizer) and current_graph_task() < 0
        if forward and not (self._quiet or self._beside or self._busy) and self._counts(tensor):
            self._exposed.add(self.seen.values[self._overwrite(tensor)].storage)

    def begin_backward(self) -> None:
        """Backward begins now."""
        self._in_backward = True
        self._emit(EventKind.BACKWARD)

    def begin_optimizer(self) -> None:
        """The optimizer step begins now."""
        self.in_optimizer = True
        self._emit(EventKind.OPTIMIZER)

    def enter_module(self, path: str, has_plain_arguments: bool) -> None:
        """A module call begins."""
        self.seen.events.append(ModuleEvent(path, has_plain_arguments))

    def exit_module(self) -> None:
        """The innermost module call ends."""
        self.seen.events.append(ModuleEvent(None))

    # ------------------------------------------------------------------------------------------------ PyTorch's side

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.in_optimizer and func is torch.ops.aten._local_scalar_dense.default and self._unspill is None:
            return 1.0  # an optimizer reads its step counter; a fake tensor has no number to give
        if self._quiet or not self._watching:
            return func(*args, **kwargs)
        was_busy, self._busy = self._busy, True
        try:
            if self._beside:
                return self._note_memory(func, args, kwargs)
            return self._dispatch(func, types, args, kwargs)
        finally:
            self._busy = was_busy

    def _note_memory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._settle_sum()
        result = func(*args, **kwargs)
        if not describe(func).is_view:
            for tensor in result_tensors(result):
                if isinstance(tensor, torch.Tensor) and not is_distributed(tensor):
                    self._value_of(tensor)
        return result

    def _dispatch(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graph_task = current_graph_task()
        if graph_task != self._graph_task:
            self._graph_task = graph_task
            self._in_engine = False
            if graph_task >= 0:
                self._follow_nodes()
        info = describe(func)
        if info.is_view:
            return func(*args, **kwargs)
        self._settle_sum()
        tensors = tensors_in((*args, *kwargs.values()))
        forward = not self._in_backward and not self.in_optimizer and graph_task < 0
        signature = self._signatures.note(func, args, kwargs)
        if not forward:
            since = len(self.seen.events)
            result = self._call(func, args, kwargs, signature)
            results = [t for t in result_tensors(result) if isinstance(t, torch.Tensor)]
            self._signatures.note_result(signature, tensors, results)
            for tensor in tensors + results:
                self._value_of(tensor)
            if not self._in_backward:  # a backward inside forward: what it writes, replay in backward would see written
                for tensor in mutated_tensors(info, args, kwargs):
                    self._overwrite(tensor)
            self._emit(EventKind.OTHER_OP, signature)
            if (
                self._in_engine
                and func is torch.ops.aten.add.Tensor
                and self._counts(args[0])
                and self._counts(result)
                and may_be_added_to(*args)
            ):
                old, new = (self.seen.values[self._value_of(t)].storage for t in (args[0], result))
                self._sum = _Sum(since, old, new, storage_key(result))
            return result
        return self._forward_op(func, info, types, args, kwargs, tensors, signature)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], signature: int) -> Any:
        """Run it; where its kernel is known to lay its results out otherwise than a real one, lay them out anew."""
        result = func(*args, **kwargs)
        key = self._signatures.keys[signature]
        if (layouts := self._corrections.get(key)) is not None:
            result = laid_out(result, layouts)
        if key not in self.layouts:
            self.layouts[key] = layouts_of(result, (*args, *kwargs.values()))
        return result

    def _forward_op(
        self,
        func: Any,
        info: OpInfo,
        types: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        signature: int,
    ) -> Any:
        seen = self.seen
        device = safety.call_device(tensors, kwargs)
        reason = safety.blocker(info, types, tensors, device.type)
        if not reason and info.is_random and safety.call_generator(args, kwargs, device) is None:
            reason = "its random state cannot be recorded"
        moved = undeclared_writes(info, args)  # running statistics, which replay leaves out
        inputs = [value for t in tensors if (value := self._value_of(t)) >= 0 and not any(t is m for m in moved)]
        if not reason and any(self.seen.values[value].storage in self._exposed for value in inputs):
            reason = "it reads memory that was handed out (numpy(), data_ptr() and their kin)"
        if not reason:
            for tensor in tensors:
                value = self._value_of(tensor)
                if value >= 0 and self._is_uninitialised(value):
                    whole = tensor is args[0] and tensor.numel() * tensor.itemsize == self._nbytes(value)
                    if not (info.is_full_writer and whole):
                        reason = "it reads uninitialised memory"
        mutated = [t for t in mutated_tensors(info, args, kwargs) if self._counts(t)]
        written = {storage_key(t): t for t in mutated}
        op_index = len(seen.ops)
        op = RawOp(
            name=info.name,
            signature=signature,
            inputs=tuple(inputs),
            mutates=tuple(self._value_of(t) for t in written.values()),
            keep_reason=reason,
            random_state_bytes=self.random_state_bytes if info.is_random else 0,
        )
        result = self._call(func, args, kwargs, signature)
        results = [t for t in result_tensors(result) if isinstance(t, torch.Tensor)]
        self._signatures.note_result(signature, tensors, results)
        for tensor in moved:
            self._overwrite(tensor)
        for position, tensor in enumerate(written.values()):
            op.outputs.append(self._overwrite(tensor, op_index, -1 - position))
        for position, tensor in enumerate(result_tensors(result)):
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or not self._counts(tensor):
                continue
            if storage_key(tensor) in self._storage_of:
                continue  # an alias of an argument
            storage = self._new_storage(tensor, "activation")
            self._emit(EventKind.ALLOC, storage)
            value = seen.storages[storage].current
            seen.values[value].op = op_index
            seen.values[value].output = position
            # Uninitialised contents are never a source and never dropped: whatever fills them later may be invisible.
            seen.values[value].overwritten = info.is_uninitialised
            op.outputs.append(value)
        seen.ops.append(op)
        self._emit(EventKind.OP, op_index)
        return result

    def _pack(self, tensor: torch.Tensor) -> Any:
        was_busy, self._busy = self._busy, True
        try:
            return self._note(tensor)
        finally:
            self._busy = was_busy

    def _note(self, tensor: torch.Tensor) -> Any:
        if (
            not self._counts(tensor)
            or tensor.layout is not torch.strided
            or is_conj_or_neg(tensor)
            or not self._watching
            or self._beside
            or isinstance(tensor, torch.nn.Parameter)
        ):
            return tensor
        value = self._value_of(tensor)
        if self.seen.storages[self.seen.values[value].storage].component != "activation":
            return tensor
        slot = len(self.seen.slots)
        self.seen.slots.append(value)
        self._borrowed[slot] = 1
        self._emit(EventKind.SAVE, slot)
        contents = None
        if self._spill is not None:
            with _quietly(self):
                contents = self._spill(tensor)
        return _Note(slot, tensor, contents, self._give_back)

    def _unpack(self, packed: Any) -> Any:
        if not isinstance(packed, _Note):
            return packed
        self._emit(EventKind.UNPACK, packed.slot)
        with _quietly(self), torch.no_grad():
            if self._unspill is not None:
                storage = self._unspill(packed.contents)
                whole = torch.empty(0, dtype=packed.dtype, device=packed.device)
                whole.set_(storage, packed.offset, packed.size, packed.stride)
                tensor = whole
            else:
                whole = torch.empty(packed.nbytes, dtype=torch.uint8, device=packed.device)
                tensor = whole.view(torch.uint8)
                if packed.dtype != torch.uint8:
                    usable = packed.nbytes // packed.dtype.itemsize * packed.dtype.itemsize
                    tensor = whole[:usable].view(packed.dtype)
                tensor = tensor.as_strided(packed.size, packed.stride, packed.offset)
        # The rebuilt tensor stands for the saved storage: operations that read it read that value.
        key = storage_key(tensor)
        self._storage_of[key] = self.seen.values[self.seen.slots[packed.slot]].storage
        self._borrowed[packed.slot] += 1
        slot = packed.slot
        release = weakref.ref(self).__call__

        def died(_: Any) -> None:
            observer = release()
            if observer is not None:
                observer._storage_of.pop(key, None)
                observer._watches.pop(key, None)
                observer._give_back(slot)

        self._watches[key] = (weakref.ref(tensor.untyped_storage(), died), WeakStorage(tensor))
        return tensor

    def _give_back(self, slot: int) -> None:
        self._borrowed[slot] -= 1
        if self._borrowed[slot] == 0 and self._watching:
            self._emit(EventKind.RELEASE, slot)

    # ------------------------------------------------------------------------------------------------ sums of gradients

    # Where a value was used twice, autograd's engine adds its gradients. It does so in the first one's memory if nobody
    # else refers to that, but never while a dispatch mode looks on: then the sum is a new tensor. What is written down
    # is what happens in a real step.

    def _follow_nodes(self) -> None:
        """Have every node that this backward may run say when its own operations are done."""
        observer = weakref.ref(self)

        def say(in_engine: bool) -> Callable[..., None]:
            def hook(*_: object) -> None:
                this = observer()
                if this is not None:
                    this._in_engine = in_engine

            return hook

        begins, ends = say(in_engine=False), say(in_engine=True)
        stack = [node for node in (current_graph_node(),) if node is not None]
        followed = set(stack)
        while stack:
            node = stack.pop()
            node.register_prehook(begins)
            if node.next_functions:  # not one that adds to a parameter's gradient, and cares who else refers to it
                node.register_hook(ends)
            for following, _ in node.next_functions:
                if following is not None and following not in followed:
                    followed.add(following)
                    stack.append(following)

    def _settle_sum(self) -> None:
        """All that the engine let go of after a sum is known: was the first gradient its own?"""
        found = self._sum
        if found is None:
            return
        self._sum = None
        events = self.seen.events[found.since :]
        if Event(EventKind.FREE, found.old) not in events or Event(EventKind.ALLOC, found.new) not in events:
            return
        events.remove(Event(EventKind.ALLOC, found.new))
        events.remove(Event(EventKind.FREE, found.old))
        self.seen.events[found.since :] = [
            Event(EventKind.FREE, found.old) if event == Event(EventKind.FREE, found.new) else event for event in events
        ]
        self._instead_of[found.new] = found.old
        self.seen.values[self.seen.storages[found.new].current].storage = found.old
        if self._storage_of.get(found.key) == found.new:
            self._storage_of[found.key] = found.old

    # ------------------------------------------------------------------------------------------------ tables

    def _emit(self, kind: EventKind, index: int = 0) -> None:
        if self._sum is not None and kind != EventKind.FREE:
            self._settle_sum()
        self.seen.events.append(Event(kind, index))

    def _counts(self, tensor: torch.Tensor) -> bool:
        return tensor.layout is torch.strided and tensor.device.type == self._device_type

    def _nbytes(self, value: int) -> int:
        return self.seen.storages[self.seen.values[value].storage].nbytes

    def _is_uninitialised(self, value: int) -> bool:
        record = self.seen.values[value]
        return record.overwritten and self.seen.storages[record.storage].current == value

    def _value_of(self, tensor: torch.Tensor) -> int:
        """The value that the tensor's storage holds now; -1 if its memory does not count."""
        if not self._counts(tensor):
            return -1
        index = self._storage_of.get(storage_key(tensor))
        if index is None:  # made where nobody looked, for example torch.tensor([...])
            index = self._new_storage(tensor, "activation")
            self._emit(EventKind.ALLOC, index)
        return self.seen.storages[index].current

    def _new_storage(self, tensor: torch.Tensor, component: str) -> int:
        seen = self.seen
        index = len(seen.storages)
        seen.values.append(RawValue(storage=index))
        nbytes = round_up(tensor.untyped_storage().nbytes(), self._device_type)
        seen.storages.append(RawStorage(nbytes=nbytes, component=component, current=len(seen.values) - 1))
        key = storage_key(tensor)
        self._storage_of[key] = index
        observer = weakref.ref(self)

        def died(_: Any) -> None:
            this = observer()
            if this is not None:
                this._storage_of.pop(key, None)
                this._watches.pop(key, None)
                if this._watching:
                    this._emit(EventKind.FREE, this._instead_of.get(index, index))

        self._watches[key] = (weakref.ref(tensor.untyped_storage(), died), WeakStorage(tensor))
        return index

    def _overwrite(self, tensor: torch.Tensor, op: int = -1, output: int = 0) -> int:
        """Forward writes into the tensor's storage: its value is dead, a new one begins."""
        value = self._value_of(tensor)
        if value < 0:
            return value
        self.seen.values[value].overwritten = True
        storage = self.seen.values[value].storage
        self.seen.values.append(RawValue(storage=storage, op=op, output=output))
        self.seen.storages[storage].current = len(self.seen.values) - 1
        return len(self.seen.values) - 1


def may_be_added_to(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether autograd's engine would add `new` to `old` in place, if nobody else refers to `old`: each of its elements
    has its own place in one block of memory, and it is nobody's view (a view refers to its base).
    """
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(old.size(), old.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return not is_view(old) and (new.layout is not torch.strided or storage_key(old) != storage_key(new))


def round_up(nbytes: int, device_type: str) -> int:
    """A storage's size in whole granules of the device's allocator."""
    return -(-nbytes // 512) * 512 if device_type == "cuda" else nbytes


class _quietly:  # noqa: N801  (used as a statement, like contextlib's)
    """Operations inside are not the step's."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __enter__(self) -> None:
        self._observer._quiet += 1

    def __exit__(self, *_: object) -> None:
        self._observer._quiet -= 1
