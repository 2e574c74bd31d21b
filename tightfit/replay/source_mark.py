"""Mark what replay will read and somebody outside could write past PyTorch, to know at the read whether he did.

Who has the address of a tensor's memory (a NumPy array that was made when the model was, a kernel of an extension) may
begin to write there at any step.  No version counter moves, and the self-check at a region's first call has seen
nothing.  Therefore each operation that is written down looks at such sources when it reads them, and so does its
replay.  What autograd's graph explains, and parameters, whose memory kernels only read, are spared.

Small storages are marked by what they hold, which can be put back; larger ones by a checksum of the part that is read.
"""

from __future__ import annotations

import torch

from tightfit._torch_private.tensors import base_of_view, storage_key
from tightfit.device.placement import is_on_host
from tightfit.device.tensor_parts import has_memory
from tightfit.replay.contents import SMALL_BYTES, Checksum, checksum_of_memory
from tightfit.step.host_copy import memory_of


def may_be_written_unseen(tensor: torch.Tensor) -> bool:
    """Return whether somebody outside could hold the address of a tensor that nothing of the step explains.

    On the host only: elsewhere, to read a mark would be to wait for the device.
    """
    if not is_on_host(tensor):
        return False
    if isinstance(tensor, torch.nn.Parameter) or not tensor.is_leaf:
        return was_given_or_lent(tensor)
    return not isinstance(base_of_view(tensor), torch.nn.Parameter) or was_given_or_lent(tensor)


def was_given_or_lent(tensor: torch.Tensor) -> bool:
    """Return whether memory came from outside (`torch.from_numpy`), or was ever shown as a NumPy array."""
    return not tensor.untyped_storage().resizable()


class SourceMark:
    """What one storage on the host held when operations read it that were written down."""

    __slots__ = ("_known", "_parts", "contents")

    def __init__(self, known: dict[int, bytes]) -> None:
        """`known`: what small storages held when others looked at them, so that it is held once."""
        self._known = known
        self.contents: bytes | None = None
        """All of a small storage; None: only checksums are known."""
        self._parts: dict[tuple[int, int], Checksum] = {}

    def fits(self, tensor: torch.Tensor) -> bool:
        """Return whether the storage holds what it held; the part that this tensor shows is looked at from now on."""
        storage = tensor.untyped_storage()
        memory = memory_of(storage)
        if storage.nbytes() <= SMALL_BYTES:
            now = memory.tobytes()
            if self.contents is None:
                self.contents = self._shared(storage_key(tensor), now)
            return self.contents == now
        begin, end = _shown_bytes(tensor)
        found = checksum_of_memory(memory[begin:end])
        return self._parts.setdefault((begin, end), found) == found

    def _shared(self, key: int, contents: bytes) -> bytes:
        if self._known.get(key) != contents:
            self._known[key] = contents
        return self._known[key]

    def still_fits(self, tensor: torch.Tensor) -> bool:
        """Return whether the storage of this tensor holds, in all parts that were looked at, what it held."""
        memory = memory_of(tensor.untyped_storage())
        if self.contents is not None:
            return self.contents == memory.tobytes()
        return all(checksum_of_memory(memory[begin:end]) == found for (begin, end), found in self._parts.items())

    def copy_like(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor of the same geometry on what the storage held; None if only its checksum is known."""
        if self.contents is None:
            return None
        storage = torch.UntypedStorage(len(self.contents))
        memory_of(storage).data[:] = self.contents
        copy = torch.empty(0, dtype=tensor.dtype)
        return copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def mark_of_source(tensor: torch.Tensor, known: dict[int, bytes]) -> SourceMark | None:
    """Return the mark of a tensor as it is now; None if it need not or cannot be watched. `known` as for the mark."""
    if tensor.layout is not torch.strided or not has_memory(tensor) or not may_be_written_unseen(tensor):
        return None
    mark = SourceMark(known)
    mark.fits(tensor)
    return mark


def _shown_bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where in its storage the bytes that a tensor shows begin and end."""
    begin, length = int(tensor.storage_offset()), 0
    if tensor.numel():
        length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * tensor.itemsize, (begin + length) * tensor.itemsize
