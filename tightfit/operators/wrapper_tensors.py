"""Take tensors that wrap others apart, and put them together again: jagged tensors, quantised weights.

By PyTorch's flatten protocol such a tensor is its parts and a description that does not change.  So an operation on it
is those that it runs on its parts, which show to a dispatch mode that leaves the wrapper's to the wrapper's own class;
and what autograd saves of it can be held as what its parts are held as.  A wrapper without the protocol is put together
from what its own class detaches from it, given the parts as attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

from tightfit.device.tensor_parts import PLAIN_TYPES, does_not_flatten, parts_of
from tightfit.operators.facts import tensors_in


@cache
def is_wrapper(kind: type) -> bool:
    """Tell whether tensors of a class wrap others; sharded ones, whose operations talk to other processes, do not."""
    is_distributed = any(base.__module__.startswith("torch.distributed.") for base in kind.__mro__)
    return hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__") and not is_distributed


def any_wrapper(kinds: Iterable[type], args: Iterable[Any]) -> bool:
    """Tell whether tensors of one of these classes, the arguments' that are not plain tensors, wrap others."""
    kinds = [kind for kind in kinds if kind not in PLAIN_TYPES]
    return any(is_wrapper(kind) for kind in kinds) or (
        bool(kinds) and any(does_not_flatten(tensor) for tensor in tensors_in(args))
    )


def wraps(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor wraps others, by PyTorch's flatten protocol or without it."""
    return is_wrapper(type(tensor)) or does_not_flatten(tensor)


class Parts:
    """What autograd holds instead of a wrapper: what its parts are held as."""

    __slots__ = ("_context", "_kind", "_names", "_parts", "_shell", "_size", "_stride")

    def __init__(self, tensor: torch.Tensor) -> None:
        """Take a wrapper apart; its parts are held as they are until `pack`."""
        self._kind = type(tensor)
        parts = parts_of(tensor)
        self._shell: torch.Tensor | None = None
        if does_not_flatten(tensor):
            self._shell = tensor.detach()
            self._names = tuple(parts)
            self._take(self._shell)
        else:
            names, self._context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # a wrapper's
            self._names = tuple(names)
        self._parts: list[Any] = list(parts.values())
        self._size, self._stride = tensor.size(), tensor.stride()

    def describes(self, tensor: torch.Tensor) -> bool:
        """Tell whether what is put together is the tensor again, as far as it shows."""
        again = self._together(self._parts)
        parts = zip(parts_of(again).values(), self._parts, strict=False)
        return (
            type(again) is type(tensor)
            and (again.dtype, again.device, again.layout) == (tensor.dtype, tensor.device, tensor.layout)
            and (again.size(), again.stride()) == (tensor.size(), tensor.stride())
            and all(one is other for one, other in parts)
        )

    def pack(self, pack: Callable[[torch.Tensor], Any]) -> bool:
        """Hold what the parts are packed as (None: the part itself); tell whether any is held otherwise.

        Integers are held themselves: jagged tensors with the very same tensor of offsets are of equal shape.
        """
        packed = [pack(part) if part.is_floating_point() or part.is_complex() else None for part in self._parts]
        self._parts = [part if other is None else other for part, other in zip(self._parts, packed, strict=True)]
        return any(other is not None for other in packed)

    def read(self, unpack: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Return the wrapper of unpacked parts."""
        again = self._together([unpack(part) for part in self._parts])
        return again.requires_grad_(False) if again.requires_grad else again

    def _together(self, parts: list[torch.Tensor]) -> torch.Tensor:
        by_name = dict(zip(self._names, parts, strict=True))
        if self._shell is not None:
            vars(self._shell).update(by_name)
            alone = self._shell.detach()
            self._take(self._shell)
            vars(alone).update(by_name)
            return alone
        again: torch.Tensor = self._kind.__tensor_unflatten__(by_name, self._context, self._size, self._stride)  # type: ignore[attr-defined]  # a wrapper's
        return again

    def _take(self, shell: torch.Tensor) -> None:
        """Have the shell hold no parts."""
        vars(shell).update(dict.fromkeys(self._names))


def held_as_parts(tensor: torch.Tensor, pack: Callable[[torch.Tensor], Any]) -> Parts | None:
    """Return a wrapper's parts, packed; None if it is to be held itself.

    It is where no part is packed, and where putting the parts together does not give the same wrapper again.
    """
    with torch.no_grad():
        parts = Parts(tensor)
        whole = parts.describes(tensor)
    return parts if whole and parts.pack(pack) else None
