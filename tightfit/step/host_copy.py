"""Copy tensors out of the device's memory, to compare with and to put back.

A copy of a CPU tensor goes to a temporary file, but for a first MiB: on a CPU, host memory *is* the device's memory,
and a snapshot of parameters, gradients and optimizer state in memory would double what the budget has to hold.  Copies
of other tensors lie in host memory.  Nothing here takes more than `_CHUNK_BYTES` of memory for a dense CPU tensor.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from tightfit._torch_private.dispatch import below_autograd, no_function_modes
from tightfit.device import device_for
from tightfit.device.tensor_parts import parts_of
from tightfit.errors import TightfitError
from tightfit.units import format_bytes

_CHUNK_BYTES = 8 * 2**20
#: Of a file of copies, what lies in memory instead.
_IN_MEMORY_BYTES = 2**20
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


class CopyFile:
    """A temporary file that holds copies; it goes when the last of them does.

    The first of them lie in memory that PyTorch's allocator does not know of: most files never hold more.
    """

    def __init__(self) -> None:
        self._first = bytearray()
        self._file: IO[bytes] | None = None
        self._end = 0

    def write(self, data: Any) -> int:
        """Append bytes, and return where they begin. Raises `TightfitError` if there is no room."""
        begin = self._end
        view = memoryview(data)
        if self._file is None and begin + len(view) <= _IN_MEMORY_BYTES:
            self._first += view
            self._end += len(view)
            return begin
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="tightfit-", buffering=0)  # noqa: SIM115  # closed with the copy
                weakref.finalize(self, self._file.close)  # before the file's own end, also in a cycle of references
            self._file.seek(begin - len(self._first))
            while len(view):
                written = self._file.write(view)
                view = view[written:]
                self._end += written
        except OSError as error:
            raise TightfitError(
                f"the temporary folder {tempfile.gettempdir()} does not take {format_bytes(len(memoryview(data)))} "
                f"({error}). Measuring keeps what it must put back there, outside the memory that the budget counts. "
                "Make room, raise the limit that this names, or name another folder in TMPDIR."
            ) from error
        return begin

    def read_into(self, begin: int, target: Any) -> None:
        """Fill `target` with the bytes from `begin` on."""
        view = memoryview(target)
        if begin + len(view) <= len(self._first):
            view[:] = memoryview(self._first)[begin : begin + len(view)]
            return
        assert self._file is not None
        self._file.seek(begin - len(self._first))
        while len(view):
            count = self._file.readinto(view)  # type: ignore[attr-defined]  # unbuffered files have it
            if not count:
                raise TightfitError(
                    "a temporary file that holds what measuring must put back was cut short by something else, so the "
                    "model's tensors cannot be restored. Do not use this model any more; load it again."
                )
            view = view[count:]


class HostCopy:
    """One tensor's contents, its metadata, and its version."""

    def __init__(self, tensor: torch.Tensor, file: CopyFile) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self._file = file
        self._begin = -1
        self._kept: torch.Tensor | None = None
        self.stride = tensor.stride() if tensor.layout is torch.strided else None
        self._parts = {name: HostCopy(part, file) for name, part in parts_of(tensor).items()}
        if self._parts:
            return
        # A copy may be taken in the middle of a planned forward, which must not take it for one of its operations.
        plain = type(tensor) in _PLAIN_TYPES
        with no_function_modes() if plain else nullcontext(), below_autograd() if plain else nullcontext():
            data = memory_of_dense(tensor)
            if data is None or data.size == 0:
                self._kept = _without_repeats(tensor).detach().to("cpu", copy=True)
            else:
                self._begin = file.write(data)

    def restore(self, tensor: torch.Tensor) -> None:
        """Give `tensor`, of which this is a copy, its contents back, bit for bit."""
        if self._parts:
            for name, part in parts_of(tensor).items():
                self._parts[name].restore(part)
        elif self._kept is not None:
            with torch.no_grad():
                _without_repeats(tensor).copy_(self._kept)
        else:
            data = memory_of_dense(tensor)
            assert data is not None
            self._file.read_into(self._begin, data)

    def load(self) -> torch.Tensor:
        """Return a new tensor of the same contents, in host memory; of a subclass, its parts' bytes."""
        if self._parts:
            return torch.cat([part.load().reshape(-1).view(torch.uint8) for part in self._parts.values()])
        if self._kept is not None:
            whole = self._kept.expand(self.shape) if self._kept.layout is torch.strided else self._kept
            return whole.clone()
        assert self.stride is not None
        loaded = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        data = memory_of_dense(loaded)
        assert data is not None
        self._file.read_into(self._begin, data)
        return loaded

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the contents in flat pieces of bounded size, in the order of `flat_chunks`."""
        if self._parts:
            for part in self._parts.values():
                yield from part.chunks()
            return
        if self._kept is not None:
            yield from flat_chunks(self.load())
            return
        itemsize = self.dtype.itemsize
        total = self.shape.numel() * itemsize
        step = _CHUNK_BYTES // itemsize * itemsize
        for begin in range(0, total, step):
            piece = torch.empty(min(step, total - begin) // itemsize, dtype=self.dtype)
            data = memory_of_dense(piece)
            assert data is not None
            self._file.read_into(self._begin + begin, data)
            yield piece


class Zeros:
    """What is put back into a tensor that held zeros: no copy is needed to know that."""

    def restore(self, tensor: torch.Tensor) -> None:
        """Fill `tensor` with zeros."""
        with torch.no_grad():
            tensor.zero_()


def same_contents(a: HostCopy, b: HostCopy | None) -> bool:
    """Tell whether shape, dtype and bits are equal; NaN equals the same NaN."""
    return (
        b is not None
        and (a.shape, a.dtype) == (b.shape, b.dtype)
        and all(bool(torch.equal(x.view(torch.uint8), y.view(torch.uint8))) for x, y in _pairs(a, b))
    )


def difference(a: HostCopy, b: HostCopy | None) -> float:
    """Return the largest absolute difference; infinite where they cannot be compared or a NaN is in one."""
    if b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return float("inf")
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    largest = [(x.to(wide) - y.to(wide)).abs().nan_to_num(nan=float("inf")).max() for x, y in _pairs(a, b)]
    return float(max(largest, default=0.0))


def _pairs(a: HostCopy, b: HostCopy) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pair the same elements of both, in pieces of bounded size where the two are laid out alike."""
    if a.stride == b.stride:
        return zip(a.chunks(), b.chunks(), strict=True)
    return iter([(a.load().reshape(-1), b.load().reshape(-1))])


def memory_of_dense(tensor: torch.Tensor) -> npt.NDArray[np.uint8] | None:
    """Show the memory of a dense CPU tensor, as `memory_of` does; None for any other tensor."""
    if type(tensor) not in _PLAIN_TYPES or not device_for(tensor).is_host:
        return None
    if tensor.layout is not torch.strided or not is_dense(tensor) or tensor.is_conj() or tensor.is_neg():
        return None
    return _shown(tensor, tensor.numel() * tensor.itemsize)


class _Memory:
    """What NumPy needs to know of memory to show it as an array; the array keeps this, and this the tensor."""

    def __init__(self, data: torch.Tensor | torch.UntypedStorage, nbytes: int) -> None:
        self._data = data
        place = (data.data_ptr(), False)
        self.__array_interface__ = {"data": place, "shape": (nbytes,), "typestr": "|u1", "version": 3}


def memory_of(data: torch.Tensor | torch.UntypedStorage) -> npt.NDArray[np.uint8]:
    """Show the memory of a storage, or of a contiguous tensor of bytes, on the CPU as an array, to read and write.

    Not through `numpy()`, after which PyTorch takes the storage for one that was given to it from outside, and so does
    the engine, for good: it would look for unseen writes at every step (see `replay.source_mark.was_given_or_lent`).
    """
    return _shown(data, len(data))


def _shown(data: torch.Tensor | torch.UntypedStorage, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.asarray(_Memory(data, nbytes)) if nbytes else np.empty(0, dtype=np.uint8)


def is_dense(tensor: torch.Tensor) -> bool:
    """Tell whether the elements fill a stretch of memory without gaps or repetition, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """Narrow dimensions that repeat one element (from `expand`) to it: PyTorch refuses to write those."""
    if tensor.layout is not torch.strided:
        return tensor  # a write through `detach` would not reach it
    tensor = tensor.detach()
    if 0 not in tensor.stride():
        return tensor
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def flat_chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the elements, flat, in bounded pieces: in the order of memory if the tensor is dense, else of indices."""
    if parts := parts_of(tensor):
        for part in parts.values():
            yield from flat_chunks(part)
        return
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)
    yield from flat.split(_CHUNK_BYTES // max(1, tensor.itemsize))
