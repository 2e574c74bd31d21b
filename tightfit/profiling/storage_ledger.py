"""Track every storage during a profiled step: allocation, contents, release."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.tensors import WeakStorage, storage_key
from tightfit.device import Device
from tightfit.device.tensor_parts import parts_of, stored_in
from tightfit.profiling.observation import Observation, RawStorage, RawValue
from tightfit.records import Event, EventKind


class StorageLedger:
    """The storages of a step, the value that each holds, and the events in order.

    Args:
        device: the device whose memory counts.
    """

    def __init__(self, device: Device) -> None:
        self.observation = Observation()
        self.is_open = False
        """Whether the step is running: only then is a storage's death recorded."""
        self.before_event: Callable[[EventKind], None] = lambda _: None
        """Called with its kind before an event is recorded."""
        self.before_write: Callable[[int], None] = lambda _: None
        """Called with a storage before a write to it is recorded."""
        self._device = device
        self._storage_of: dict[int, int] = {}
        self._watches: dict[int, tuple[weakref.ref[Any], WeakStorage]] = {}
        self._resizable: dict[int, int] = {}  # by the key of a resizable tensor: its storage now
        self._merged_into: dict[int, int] = {}  # by storage, see `merge`
        self._unseen: list[int] = []  # storages, see `hold_unseen`
        self._streams = {device.current_stream(): 0}  # their numbers

    def emit(self, kind: EventKind, index: int = 0) -> None:
        """Record an event; `index` names its op, slot, storage or signature."""
        self.before_event(kind)
        self.observation.events.append(Event(kind, index))

    def counts(self, tensor: torch.Tensor) -> bool:
        """Tell whether the tensor is strided, no wrapper of others, and on the device whose memory counts."""
        return tensor.layout is torch.strided and self._device.holds(tensor) and not parts_of(tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Tell whether the tensor's storage is in the ledger."""
        return storage_key(tensor) in self._storage_of

    def nbytes(self, value: int) -> int:
        """Return the size of a value's storage in bytes."""
        return self.observation.storages[self.observation.values[value].storage].nbytes

    def is_uninitialised(self, value: int) -> bool:
        """Tell whether the value is memory that no op has written yet (`torch.empty`)."""
        record = self.observation.values[value]
        return record.overwritten and self.observation.storages[record.storage].current == value

    def value_of(self, tensor: torch.Tensor) -> int:
        """Return the index of the value that the tensor's storage holds now; -1 if its memory does not count."""
        if not self.counts(tensor):
            return -1
        index = self._storage_of.get(storage_key(tensor))
        if index is None:  # made outside the dispatcher, for example by torch.tensor([...])
            index = self.add(tensor, "activation")
            self.emit(EventKind.ALLOC, index)
        return self.observation.storages[index].current

    def note_parts(self, tensor: torch.Tensor) -> None:
        """Count the memory of what a tensor subclass wraps, which an operation that is not seen may have made."""
        for part in stored_in(tensor) if parts_of(tensor) else ():
            self.value_of(part)

    def add(self, tensor: torch.Tensor, component: str) -> int:
        """Add the tensor's storage with a first value and watch for its death; return its index."""
        index = self._add_storage(tensor, component)
        key = storage_key(tensor)
        self._storage_of[key] = index
        ledger = weakref.ref(self)

        def died() -> None:
            this = ledger()
            if this is not None and this.is_open:
                this.emit(EventKind.FREE, this._merged_into.get(index, index))

        self._watch(tensor, died)
        return index

    def substitute(self, tensor: torch.Tensor, storage: int, died: Callable[[], None]) -> None:
        """Let ops that read the tensor read the value of another storage; call `died` when the tensor dies."""
        self._storage_of[storage_key(tensor)] = storage
        self._watch(tensor, died)

    def overwrite(self, tensor: torch.Tensor, op: int = -1, output: int = 0) -> int:
        """Record an in-place write to the tensor's storage: end its value and return the index of the new one."""
        value = self.value_of(tensor)
        if value < 0:
            return value
        storage = self.observation.values[value].storage
        self.before_write(storage)
        self.observation.values[value].overwritten = True
        self.observation.values.append(RawValue(storage=storage, op=op, output=output))
        self.observation.storages[storage].current = len(self.observation.values) - 1
        return len(self.observation.values) - 1

    def resize(self, tensor: torch.Tensor) -> None:
        """Record that a resizable tensor's storage was allocated or freed in place."""
        key = storage_key(tensor)
        empty = tensor.untyped_storage().nbytes() == 0
        if key in self._resizable and empty:
            self.emit(EventKind.FREE, self._resizable.pop(key))
        elif key not in self._resizable and not empty:
            self._resizable[key] = index = self._add_storage(tensor, "activation")
            self.emit(EventKind.ALLOC, index)

    def merge(self, new: int, key: int, old: int) -> None:
        """Treat the storage `new`, whose `storage_key` is `key`, as the storage `old` from now on and at its death.

        Called where the observed step allocates a tensor that a real step writes into `old`.
        """
        self._merged_into[new] = old
        self.observation.values[self.observation.storages[new].current].storage = old
        if self._storage_of.get(key) == new:
            self._storage_of[key] = old

    def hold_unseen(self, nbytes: int) -> None:
        """Record memory that autograd holds until backward, of which it shows nobody a tensor."""
        if nbytes:
            index = self._add_bytes(nbytes, "activation")
            self._unseen.append(index)
            self.emit(EventKind.ALLOC, index)

    def free_unseen(self) -> None:
        """Record that backward is over, with which all that goes which `hold_unseen` recorded."""
        for index in self._unseen:
            self.emit(EventKind.FREE, index)
        self._unseen = []

    def _add_storage(self, tensor: torch.Tensor, component: str) -> int:
        return self._add_bytes(tensor.untyped_storage().nbytes(), component)

    def _add_bytes(self, nbytes: int, component: str) -> int:
        observation = self.observation
        index = len(observation.storages)
        observation.values.append(RawValue(storage=index))
        nbytes = self._device.round_up(nbytes)
        stream = self._streams.setdefault(self._device.current_stream(), len(self._streams))
        current = len(observation.values) - 1
        observation.storages.append(RawStorage(nbytes=nbytes, component=component, current=current, stream=stream))
        return index

    def _watch(self, tensor: torch.Tensor, died: Callable[[], None]) -> None:
        key = storage_key(tensor)
        ledger = weakref.ref(self)

        def gone(_: Any) -> None:
            this = ledger()
            if this is not None:
                this._storage_of.pop(key, None)
                this._watches.pop(key, None)
                died()

        self._watches[key] = (weakref.ref(tensor.untyped_storage(), gone), WeakStorage(tensor))
