"""Saved-tensor hooks for profiling: autograd keeps placeholders instead of tensors.

So a storage dies in the observed step when its last other reference dies, and a placeholder dies when autograd releases
the saved tensor.  Both moments are recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from tightfit._torch_private.compiling import never_compiled
from tightfit._torch_private.dispatch import fake_device_of
from tightfit._torch_private.tensors import is_conj_or_neg, storage_key
from tightfit.operators.wrapper_tensors import Parts, held_as_parts, wraps
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.records import EventKind


class _Placeholder:
    """What autograd holds instead of a saved tensor: its geometry, and where its bytes are."""

    __slots__ = ("contents", "device", "dtype", "nbytes", "offset", "on_release", "size", "slot", "stride")

    def __init__(self, slot: int, tensor: torch.Tensor, contents: Any, on_release: Callable[[int], None]) -> None:
        self.slot = slot
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.dtype = tensor.dtype
        self.device = fake_device_of(tensor) or tensor.device  # not what a described one tells a model's code
        self.nbytes = tensor.untyped_storage().nbytes()
        self.contents = contents
        self.on_release = on_release

    @property
    def fills_storage(self) -> bool:
        """Whether the tensor begins where its storage begins, and ends where that ends."""
        if self.offset or 0 in self.size:
            return False
        last = sum((count - 1) * step for count, step in zip(self.size, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize == self.nbytes

    def __del__(self) -> None:
        self.on_release(self.slot)


#: How an error names `torch.utils.checkpoint`.
CHECKPOINTING = "gradient checkpointing that is on in the model (torch.utils.checkpoint)"


def owner_of_hook(hook: Any) -> str:
    """Name for people whose saved-tensor hook it is."""
    module = str(getattr(hook, "__module__", ""))
    if module == "torch.utils.checkpoint":
        return CHECKPOINTING
    name = str(getattr(hook, "__qualname__", type(hook).__qualname__)).partition(".<locals>")[0]
    return f"saved-tensor hooks of {module}.{name.removesuffix('.__init__')}"


class SavedTensors:
    """The pack and unpack hooks, which record a SAVE, UNPACK and RELEASE event for each slot.

    In a backward inside forward that keeps its graph, the end of what was unpacked is a READ event.

    Args:
        ledger: the ledger that the events go to.
        unrecorded: a context whose ops are not recorded as the step's.
        spill, unspill: move a saved tensor's storage out of memory and back. None on fake tensors, which have no data.
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
        self._references: dict[int, int] = {}  # by slot: its placeholder and unpacked tensors that are alive
        self._slot_of: dict[int, int] = {}  # by the `storage_key` of an unpacked tensor that is alive
        self.keeps_graph = False
        """Whether a backward inside forward runs that keeps its graph."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return a placeholder for an activation; parameters and tensors on other devices are saved as they are."""
        ledger = self._ledger
        if wraps(tensor) and not isinstance(tensor, torch.nn.Parameter):
            return held_as_parts(tensor, self._pack_part) or tensor
        if not ledger.counts(tensor) or is_conj_or_neg(tensor) or isinstance(tensor, torch.nn.Parameter):
            return tensor
        observation = ledger.observation
        value = ledger.value_of(tensor)
        if observation.storages[observation.values[value].storage].component != "activation":
            return tensor
        slot = len(observation.slots)
        read = self._slot_of.get(storage_key(tensor))
        if read is not None and observation.slots[read] == value:
            observation.saved_again[slot] = read
        observation.slots.append(value)
        self._references[slot] = 1
        ledger.emit(EventKind.SAVE, slot)
        contents = None
        if self._spill is not None:
            with self._unrecorded():
                contents = self._spill(tensor)
        return _Placeholder(slot, tensor, contents, self._release)

    def _pack_part(self, part: torch.Tensor) -> Any:
        packed = self.pack(part)
        return None if packed is part else packed

    @never_compiled
    def unpack(self, packed: Any) -> Any:
        """Return the saved tensor, or on fake tensors an empty one of the same geometry."""
        if type(packed) is Parts:
            return packed.read(self.unpack)
        if not isinstance(packed, _Placeholder):
            return packed
        slot = packed.slot
        self._ledger.emit(EventKind.UNPACK, slot)
        with self._unrecorded(), torch.no_grad():
            tensor = self._rebuild(packed)
        self._references[slot] += 1
        key = storage_key(tensor)
        self._slot_of[key] = slot
        saved_tensors = weakref.ref(self)

        def died() -> None:
            this = saved_tensors()
            if this is not None:
                this._slot_of.pop(key, None)
                this._release(slot)

        observation = self._ledger.observation
        self._ledger.substitute(tensor, observation.values[observation.slots[slot]].storage, died)
        return tensor

    def is_unpacked(self, tensor: torch.Tensor) -> bool:
        """Tell whether the tensor is what a slot was read as."""
        return storage_key(tensor) in self._slot_of

    def _rebuild(self, placeholder: _Placeholder) -> torch.Tensor:
        size, stride, offset = placeholder.size, placeholder.stride, placeholder.offset
        if self._unspill is not None:
            storage = self._unspill(placeholder.contents)
            return torch.empty(0, dtype=placeholder.dtype, device=placeholder.device).set_(
                storage, offset, size, stride
            )
        if placeholder.fills_storage:  # one operation on fake tensors, which take long, instead of four
            return torch.empty_strided(size, stride, dtype=placeholder.dtype, device=placeholder.device)
        flat = torch.empty(placeholder.nbytes, dtype=torch.uint8, device=placeholder.device)
        itemsize = placeholder.dtype.itemsize
        typed = flat[: placeholder.nbytes // itemsize * itemsize].view(placeholder.dtype)
        return typed.as_strided(size, stride, offset)

    def _release(self, slot: int) -> None:
        self._references[slot] -= 1
        if not self._ledger.is_open:
            return
        if self._references[slot] == 0:
            self._ledger.emit(EventKind.RELEASE, slot)
        elif self._references[slot] == 1 and self.keeps_graph:
            self._ledger.emit(EventKind.READ, slot)
