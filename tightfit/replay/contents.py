"""Compare what tensors hold, and know it again by a checksum."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tightfit._torch_private.dispatch import below_autograd
from tightfit.device import device_for
from tightfit.step.host_copy import memory_of

Checksum = tuple[object, ...]

#: Words in a row of the checksum's layout: of 8 bytes on the host, of 4 elsewhere.
_ROW_ON_HOST, _ROW = 509, 61
#: Rows that are summed at a time elsewhere: 64 MB, with ten launches.
_PIECE_ROWS = 2**18
_LOWER_HALF = np.uint64(2**32 - 1)


def same_bits(a: Any, b: Any) -> bool:
    """Return whether type, shape, dtype and bits are equal (NaN equals that NaN); what is no tensor compares by ==."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(a == b) if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) else False
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if a.layout is not torch.strided:
        return bool(torch.equal(a.to_dense(), b.to_dense()))
    if bool(torch.equal(a, b)) and not (a.is_floating_point() or a.is_complex()):
        return True
    return bool(torch.equal(_as_bytes(a), _as_bytes(b)))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def checksum(tensor: torch.Tensor) -> Checksum:
    """Return sums over the words of the tensor's storage, laid out in rows, that tell of every change of a single word
    and of changes of order: of all, of the rows weighted by their place, and of the columns weighted by theirs.
    """
    storage = tensor.untyped_storage()
    return checksum_of_memory(memory_of(storage)) if device_for(tensor).is_host else _checksum_elsewhere(storage)


def checksum_of_memory(memory: npt.NDArray[np.uint8]) -> Checksum:
    """Return such sums over memory on the host."""
    words = memory[: memory.size // 8 * 8].view(np.uint64)
    grid = words[: words.size // _ROW_ON_HOST * _ROW_ON_HOST].reshape(-1, _ROW_ON_HOST)
    rows, columns = grid.sum(axis=1), grid.sum(axis=0)  # modulo 2 ** 64
    return memory[grid.nbytes :].tobytes(), int(rows.sum()), *_weighted(rows), *_weighted(columns)


def _weighted(sums: npt.NDArray[np.uint64]) -> tuple[int, int]:
    """Return the weighted sums of the lower halves and of the upper ones: no place overflows a half."""
    places = np.arange(1, sums.size + 1, dtype=np.uint64)
    return int(((sums & _LOWER_HALF) * places).sum()), int(((sums >> np.uint64(32)) * places).sum())


def _checksum_elsewhere(storage: torch.UntypedStorage) -> Checksum:
    with below_autograd():
        words = _bytes_of(storage)
        if words.data_ptr() % 4:
            words = words.clone()
        tail = words[storage.nbytes() // 4 * 4 :].sum(dtype=torch.int64)
        numbers = words[: storage.nbytes() // 4 * 4].view(torch.int32)
        plain = by_row = torch.zeros((), dtype=torch.int64, device=storage.device)
        columns = torch.zeros(_ROW, dtype=torch.int64, device=storage.device)
        for first, piece in enumerate(numbers.split(_ROW * _PIECE_ROWS)):
            whole = piece.numel() // _ROW * _ROW
            grid, rest = piece[:whole].view(-1, _ROW), piece[whole:].to(torch.int64)
            rows = torch.cat([grid.sum(1, dtype=torch.int64), rest.sum()[None]])
            plain = plain + rows.sum()
            by_row = by_row + (rows * (_places(rows) + first * _PIECE_ROWS)).sum()
            columns += grid.sum(0, dtype=torch.int64)
            columns[: rest.numel()] += rest
        return int(plain + tail), int(by_row), int((columns * _places(columns)).sum())


#: Up to here the contents themselves are their mark: copying them is quicker than adding them up.
SMALL_BYTES = 64 << 10


def mark_of(tensor: torch.Tensor) -> object:
    """Return what tells these contents from others: the bytes of a small storage, else its checksum."""
    storage = tensor.untyped_storage()
    if storage.nbytes() > SMALL_BYTES:
        return checksum(tensor)
    if device_for(tensor).is_host:
        return memory_of(storage).tobytes()
    with below_autograd():
        return memory_of(_bytes_of(storage).cpu().untyped_storage()).tobytes()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    words = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return words.set_(storage, 0, (storage.nbytes(),), (1,))


def _places(numbers: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, numbers.numel() + 1, device=numbers.device)
