"""Know a tensor's contents again by a mark, computed where the tensor is, so that nothing is copied to the host.

On a CPU the contents themselves are kept, in a file: there, nothing is gained by less.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch

from tightfit._torch_private.dispatch import below_autograd
from tightfit.device import device_for
from tightfit.step.host_copy import CopyFile, HostCopy
from tightfit.step.results import Keep

#: Elements that are mixed at a time, with some 30 MB of the device's memory on the way.
_PIECE_ELEMENTS = 2**20
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
#: Odd numbers without a pattern, as signed 64-bit integers (those of splitmix64 and MurmurHash).
_BY_PLACE, _FIRST, _SECOND, _THIRD = (
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xFF51AFD7ED558CCD)
)
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells a tensor's contents from others: shape, dtype, and 128 bits that follow from all bits in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sums: tuple[int, int]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Mark:
        """Mark a strided tensor; equal contents have equal marks, however they lie in memory."""
        with below_autograd():
            flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
            words = flat.view(_WORDS[flat.itemsize])
            places = torch.arange(min(words.numel(), _PIECE_ELEMENTS), device=words.device)
            sums = torch.zeros(2, dtype=torch.int64, device=words.device)
            for number, piece in enumerate(words.split(_PIECE_ELEMENTS)):
                # Each word is mixed with its place, so that no two errors are likely to cancel in the sums.
                mixed = (places[: piece.numel()] + number * _PIECE_ELEMENTS) * _BY_PLACE
                mixed ^= piece
                for factor, shift in ((_FIRST, 30), (_SECOND, 27)):
                    mixed ^= mixed >> shift
                    mixed *= factor
                sums[0] += mixed.sum()
                mixed ^= mixed >> 31
                mixed *= _THIRD
                mixed ^= mixed >> 33
                sums[1] += mixed.sum()
            first, second = sums.tolist()
        return cls(tuple(tensor.shape), tensor.dtype, (first, second))


def keeper(copied: AbstractSet[str] | None = None) -> Keep:
    """Return what keeps tensors of one run.

    Args:
        copied: names of what to copy, wherever it is, to tell later by how much it differs; the rest of what is not on
            a CPU is marked.
    """
    file = CopyFile()

    def keep(name: str, tensor: torch.Tensor) -> object:
        is_marked = type(tensor) in _PLAIN_TYPES and tensor.layout is torch.strided and not device_for(tensor).is_host
        if is_marked and (copied is None or name not in copied):
            return Mark.of(tensor)
        return HostCopy(tensor, file)

    return keep
