"""What autograd holds while a step is watched: notes of the tensors that it saves, instead of the tensors.

So the death of a storage shows when its last other reference died, and a note's death shows when autograd lets go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from tightfit._torch_private import is_conj_or_neg
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.records import EventKind


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


class SavedTensors:
    """See the module.

    Args:
        ledger: where savings, readings and releases are noted.
        unrecorded: a context in which operations are not the step's.
        spill, unspill: where a note's bytes go, and how they come back; None: there are none.
    """

    def __init__(
        self,
        ledger: StorageLedger,
        unrecorded: Callable[[], AbstractContextManager[None]],
        spill: Callable[[torch.Tensor], Any] | None,
        unspill: Callable[[Any], torch.UntypedStorage] | None,
    ) -> None:
        self._ledger = ledger
        self._unrecorded = unrecorded
        self._spill = spill
        self._unspill = unspill
        self._borrowed: dict[int, int] = {}  # slot -> notes and rebuilt tensors that still stand for it

    def pack(self, tensor: torch.Tensor) -> Any:
        """A note, or the tensor itself where nobody needs one."""
        ledger = self._ledger
        if not ledger.counts(tensor) or is_conj_or_neg(tensor) or isinstance(tensor, torch.nn.Parameter):
            return tensor
        value = ledger.value_of(tensor)
        if ledger.observation.storages[ledger.observation.values[value].storage].component != "activation":
            return tensor
        slot = len(ledger.observation.slots)
        ledger.observation.slots.append(value)
        self._borrowed[slot] = 1
        ledger.emit(EventKind.SAVE, slot)
        contents = None
        if self._spill is not None:
            with self._unrecorded():
                contents = self._spill(tensor)
        return _Note(slot, tensor, contents, self._give_back)

    def unpack(self, packed: Any) -> Any:
        """The tensor that `pack` was given, or one like it."""
        if not isinstance(packed, _Note):
            return packed
        slot = packed.slot
        self._ledger.emit(EventKind.UNPACK, slot)
        with self._unrecorded(), torch.no_grad():
            tensor = self._rebuilt(packed)
        self._borrowed[slot] += 1
        savings = weakref.ref(self)

        def died() -> None:
            this = savings()
            if this is not None:
                this._give_back(slot)

        observation = self._ledger.observation
        self._ledger.stand_in(tensor, observation.values[observation.slots[slot]].storage, died)
        return tensor

    def _rebuilt(self, note: _Note) -> torch.Tensor:
        if self._unspill is not None:
            storage = self._unspill(note.contents)
            whole = torch.empty(0, dtype=note.dtype, device=note.device)
            whole.set_(storage, note.offset, note.size, note.stride)
            return whole
        whole = torch.empty(note.nbytes, dtype=torch.uint8, device=note.device)
        tensor = whole.view(torch.uint8)
        if note.dtype != torch.uint8:
            usable = note.nbytes // note.dtype.itemsize * note.dtype.itemsize
            tensor = whole[:usable].view(note.dtype)
        return tensor.as_strided(note.size, note.stride, note.offset)

    def _give_back(self, slot: int) -> None:
        self._borrowed[slot] -= 1
        if self._borrowed[slot] == 0 and self._ledger.is_open:
            self._ledger.emit(EventKind.RELEASE, slot)
