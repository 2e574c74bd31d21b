"""Keeps account of storages while a step is watched: which there are, what each of them holds, and when it dies."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private import WeakStorage, storage_key
from tightfit.profiling.observation import Observation, RawStorage, RawValue
from tightfit.records import Event, EventKind


class StorageLedger:
    """See the module.  `device_type` is the device whose memory counts."""

    def __init__(self, device_type: str) -> None:
        self.observation = Observation()
        self.is_open = False
        """Deaths are noted."""
        self.before_event: Callable[[EventKind], None] = lambda _: None
        """Called before an event is noted."""
        self._device_type = device_type
        self._storage_of: dict[int, int] = {}
        self._watches: dict[int, tuple[weakref.ref[Any], WeakStorage]] = {}
        self._gathered: dict[int, int] = {}  # of tensors that come and go in place: what they hold now
        self._instead_of: dict[int, int] = {}  # see `merge`

    def emit(self, kind: EventKind, index: int = 0) -> None:
        """Note an event."""
        self.before_event(kind)
        self.observation.events.append(Event(kind, index))

    def counts(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is on the device that counts."""
        return tensor.layout is torch.strided and tensor.device.type == self._device_type

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage was seen before."""
        return storage_key(tensor) in self._storage_of

    def nbytes(self, value: int) -> int:
        """Of the storage that a value is in."""
        return self.observation.storages[self.observation.values[value].storage].nbytes

    def is_uninitialised(self, value: int) -> bool:
        """Nobody was seen to write the value."""
        record = self.observation.values[value]
        return record.overwritten and self.observation.storages[record.storage].current == value

    def value_of(self, tensor: torch.Tensor) -> int:
        """The value that the tensor's storage holds now; -1 if its memory does not count."""
        if not self.counts(tensor):
            return -1
        index = self._storage_of.get(storage_key(tensor))
        if index is None:  # made where nobody looked, for example torch.tensor([...])
            index = self.add(tensor, "activation")
            self.emit(EventKind.ALLOC, index)
        return self.observation.storages[index].current

    def add(self, tensor: torch.Tensor, component: str) -> int:
        """Take in a new storage, with a value; its death will be noted."""
        index = self._add_storage(tensor, component)
        key = storage_key(tensor)
        self._storage_of[key] = index
        ledger = weakref.ref(self)

        def died() -> None:
            this = ledger()
            if this is not None and this.is_open:
                this.emit(EventKind.FREE, this._instead_of.get(index, index))

        self._watch(tensor, died)
        return index

    def stand_in(self, tensor: torch.Tensor, storage: int, died: Callable[[], None]) -> None:
        """Until it dies, the tensor stands for another storage: operations that read it read that one's value."""
        self._storage_of[storage_key(tensor)] = storage
        self._watch(tensor, died)

    def overwrite(self, tensor: torch.Tensor, op: int = -1, output: int = 0) -> int:
        """Forward writes into the tensor's storage: its value is dead, a new one begins."""
        value = self.value_of(tensor)
        if value < 0:
            return value
        self.observation.values[value].overwritten = True
        storage = self.observation.values[value].storage
        self.observation.values.append(RawValue(storage=storage, op=op, output=output))
        self.observation.storages[storage].current = len(self.observation.values) - 1
        return len(self.observation.values) - 1

    def resize(self, tensor: torch.Tensor) -> None:
        """A tensor whose memory comes and goes has got some, or given it back."""
        key = storage_key(tensor)
        empty = tensor.untyped_storage().nbytes() == 0
        if key in self._gathered and empty:
            self.emit(EventKind.FREE, self._gathered.pop(key))
        elif key not in self._gathered and not empty:
            self._gathered[key] = index = self._add_storage(tensor, "activation")
            self.emit(EventKind.ALLOC, index)

    def merge(self, new: int, key: int, old: int) -> None:
        """What was seen as the storage `new`, with that key, is `old` in a real step, from now on and at its death."""
        self._instead_of[new] = old
        self.observation.values[self.observation.storages[new].current].storage = old
        if self._storage_of.get(key) == new:
            self._storage_of[key] = old

    def _add_storage(self, tensor: torch.Tensor, component: str) -> int:
        observation = self.observation
        index = len(observation.storages)
        observation.values.append(RawValue(storage=index))
        nbytes = _round_up(tensor.untyped_storage().nbytes(), self._device_type)
        observation.storages.append(RawStorage(nbytes=nbytes, component=component, current=len(observation.values) - 1))
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


def _round_up(nbytes: int, device_type: str) -> int:
    """A storage's size in whole granules of the device's allocator."""
    return -(-nbytes // 512) * 512 if device_type == "cuda" else nbytes
