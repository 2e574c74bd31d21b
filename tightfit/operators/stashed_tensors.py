"""Hold otherwise what an `autograd.Function` keeps as attributes of its context: ``ctx.mask = mask``.

No hook of PyTorch's sees such tensors.  They are taken off the context at the end of forward, and put back for the
time that its backward runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private import backward_keeps_graph
from tightfit.errors import UnsupportedInput

_CONTAINERS = (list, tuple)


def stashed_in(context: Any) -> list[torch.Tensor]:
    """List the tensors that a context has as attributes, in the order in which it got them."""
    found = []
    for value in vars(context).values() if context is not None else ():
        found += [part for part in (value if type(value) in _CONTAINERS else (value,)) if _is_plain(part)]
    return found


def hold_otherwise(context: Any, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> None:
    """Hold what the tensors of a context are packed as, until its backward.

    Args:
        context: of a forward that is at its end.
        pack: what to hold instead of a tensor; None: itself.
        unpack: what backward gets for that.
    """
    held = {name: value for name, value in vars(context).items() if stashed_in_value(value)}
    packed = {name: packing for name, value in held.items() if (packing := _packed(value, pack)) is not None}
    if packed:
        for name in packed:
            delattr(context, name)
        _Stash(context, packed, unpack)


def stashed_in_value(value: Any) -> bool:
    """Tell whether an attribute is a tensor, or a list or tuple with tensors in it."""
    return any(_is_plain(part) for part in (value if type(value) in _CONTAINERS else (value,)))


def _is_plain(value: Any) -> bool:
    return type(value) is torch.Tensor and value.layout is torch.strided


class _Part:
    """What is held for one tensor."""

    __slots__ = ("packed", "requires_grad")

    def __init__(self, packed: Any, requires_grad: bool) -> None:
        self.packed = packed
        self.requires_grad = requires_grad


def _packed(value: Any, pack: Callable[[torch.Tensor], Any]) -> Any:
    """Return the attribute with parts in place of tensors; None if none of them is held otherwise."""

    def part_of(tensor: Any) -> Any:
        packed = pack(tensor) if _is_plain(tensor) else None
        return tensor if packed is None else _Part(packed, tensor.requires_grad)

    parts = type(value)([part_of(part) for part in value]) if type(value) in _CONTAINERS else part_of(value)
    changed = any(type(part) is _Part for part in (parts if type(parts) in _CONTAINERS else (parts,)))
    return parts if changed else None


class _Stash:
    """The attributes of one context that are held otherwise; the node has its hooks, so they must not have the node."""

    def __init__(self, context: Any, packed: dict[str, Any], unpack: Callable[[Any], torch.Tensor]) -> None:
        self._context = weakref.ref(context)
        self._packed = packed
        self._unpack = unpack
        context.register_prehook(self._put_back)
        context.register_hook(self._take_off)

    def _put_back(self, _: Any) -> None:
        if torch.is_grad_enabled():
            raise UnsupportedInput(
                "a backward with create_graph=True reads tensors that an autograd.Function keeps as attributes of its "
                "context, and that a plan has dropped. What is recomputed has no history to differentiate. Use "
                "ctx.save_for_backward there, or leave the module that calls it untouched: fit(..., exclude=module)."
            )
        context = self._context()
        for name, parts in self._packed.items():
            if type(parts) in _CONTAINERS:
                setattr(context, name, type(parts)([self._unpacked(part) for part in parts]))
            else:
                setattr(context, name, self._unpacked(parts))

    def _unpacked(self, part: Any) -> Any:
        return self._unpack(part.packed).requires_grad_(part.requires_grad) if type(part) is _Part else part

    def _take_off(self, *_: Any) -> None:
        context = self._context()
        for name in self._packed:
            delattr(context, name)
        if not backward_keeps_graph():
            self._packed.clear()
