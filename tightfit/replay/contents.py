"""Compare what tensors hold, and know it again by a checksum."""

from __future__ import annotations

from typing import Any

import torch

from tightfit._torch_private import below_autograd
from tightfit.device import device_for

Checksum = tuple[int, int, int]


#: Words in a row of the checksum's layout, and rows that are summed at a time: 1 MB on the host, where the sums need
#: twice a piece's memory; 64 MB elsewhere, where they need none, and each piece is ten launches.
_ROW = 61
_PIECE_ROWS_ON_HOST, _PIECE_ROWS = 2**12, 2**18


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
    """Return three sums over the bytes of the tensor's storage, laid out in rows: plain, rows weighted by their place,
    and columns weighted by theirs, so that a change of order shows too.
    """
    with below_autograd():
        storage = tensor.untyped_storage()
        words = torch.empty(0, dtype=torch.uint8, device=storage.device)
        words.set_(storage, 0, (storage.nbytes(),), (1,))
        if words.data_ptr() % 4:
            words = words.clone()
        tail = words[storage.nbytes() // 4 * 4 :].sum(dtype=torch.int64)
        numbers = words[: storage.nbytes() // 4 * 4].view(torch.int32)
        plain = by_row = torch.zeros((), dtype=torch.int64, device=storage.device)
        columns = torch.zeros(_ROW, dtype=torch.int64, device=storage.device)
        piece_rows = _PIECE_ROWS_ON_HOST if device_for(tensor).is_host else _PIECE_ROWS
        for first, piece in enumerate(numbers.split(_ROW * piece_rows)):
            whole = piece.numel() // _ROW * _ROW
            grid, rest = piece[:whole].view(-1, _ROW), piece[whole:].to(torch.int64)
            rows = torch.cat([grid.sum(1, dtype=torch.int64), rest.sum()[None]])
            plain = plain + rows.sum()
            by_row = by_row + (rows * (_places(rows) + first * piece_rows)).sum()
            columns += grid.sum(0, dtype=torch.int64)
            columns[: rest.numel()] += rest
        return int(plain + tail), int(by_row), int((columns * _places(columns)).sum())


#: Up to here the contents themselves are their mark: reading them is quicker than adding them up.
_SMALL_BYTES = 64 << 10


def mark_of(tensor: torch.Tensor) -> object:
    """Return what tells these contents from others: the bytes of a small storage, else its checksum."""
    storage = tensor.untyped_storage()
    if storage.nbytes() > _SMALL_BYTES:
        return checksum(tensor)
    with below_autograd():
        words = torch.empty(0, dtype=torch.uint8, device=storage.device)
        words.set_(storage, 0, (storage.nbytes(),), (1,))
        return words.to("cpu", copy=True).numpy().tobytes()  # of a copy: `numpy()` marks a storage for good


def _places(numbers: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, numbers.numel() + 1, device=numbers.device)
