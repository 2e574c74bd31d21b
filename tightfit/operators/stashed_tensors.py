"""Hold otherwise what an `autograd.Function` keeps as attributes of its context: ``ctx.mask = mask``.

No hook of PyTorch's sees such tensors.  They are taken off the context at the end of forward, and put back for the
time that its backward runs, with the history that autograd gives back to what it saves: with ``create_graph=True`` they
are differentiated again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.autograd import backward_keeps_graph
from tightfit.errors import UnsupportedInput
from tightfit.operators.facts import result_tensors

_CONTAINERS = (list, tuple)


def stashed_in(context: Any) -> list[torch.Tensor]:
    """List the tensors that a context has as attributes, in the order in which it got them."""
    found = []
    for value in vars(context).values() if context is not None else ():
        found += [part for part in _parts(value) if _is_plain(part)]
    return found


def hold_otherwise(
    context: Any, result: Any, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]
) -> None:
    """Hold what the tensors of a context are packed as, until its backward.

    Args:
        context: of a forward that is at its end.
        result: what that returns.
        pack: what to hold instead of a tensor; None: itself.
        unpack: what backward gets for that.
    """
    outputs = {id(tensor) for tensor in result_tensors(result)}

    def packed(value: Any) -> Any:
        """Return the attribute with parts in place of tensors; None if none of them is held otherwise."""
        parts = [part_of(part) for part in _parts(value)]
        return None if all(type(part) is not _Part for part in parts) else _like(value, parts)

    def part_of(tensor: Any) -> Any:
        held = pack(tensor) if _is_plain(tensor) else None
        return tensor if held is None else _Part(tensor, held, unpack, is_output=id(tensor) in outputs)

    stash = {name: parts for name, value in list(vars(context).items()) if (parts := packed(value)) is not None}
    if stash:
        for name in stash:
            delattr(context, name)
        _Stash(context, stash)


def _parts(value: Any) -> list[Any]:
    return list(value) if type(value) in _CONTAINERS else [value]


def _like(value: Any, parts: list[Any]) -> Any:
    return type(value)(parts) if type(value) in _CONTAINERS else parts[0]


def _is_plain(value: Any) -> bool:
    return type(value) is torch.Tensor and value.layout is torch.strided


class _Saving(torch.autograd.Function):
    """Saves a tensor, so that its node gives it back with the history that it had."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return tensor


class _Part:
    """What is held for one tensor."""

    __slots__ = ("_is_output", "_node", "_packed", "_unpack")

    def __init__(
        self, tensor: torch.Tensor, packed: Any, unpack: Callable[[Any], torch.Tensor], *, is_output: bool
    ) -> None:
        self._is_output = is_output  # which has no history before forward has ended
        self._packed = packed
        self._unpack = unpack
        self._node: Any = None
        if tensor.requires_grad:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: packed, unpack):
                self._node = _Saving.apply(tensor).grad_fn  # type: ignore[no-untyped-call]  # not annotated

    def read(self) -> torch.Tensor:
        if self._is_output and torch.is_grad_enabled():
            raise UnsupportedInput(
                "a backward with create_graph=True reads a result that an autograd.Function keeps as an attribute of "
                "its context, and that a plan has dropped. What is recomputed there has no history to differentiate. "
                "Use ctx.save_for_backward, or leave the module that calls it untouched: fit(..., exclude=module)."
            )
        if self._node is None:
            return self._unpack(self._packed)
        (tensor,) = self._node.saved_tensors
        return tensor  # type: ignore[no-any-return]  # a node's are tensors


class _Stash:
    """The attributes of one context that are held otherwise; the node has its hooks, so they must not have the node."""

    def __init__(self, context: Any, packed: dict[str, Any]) -> None:
        self._context = weakref.ref(context)
        self._packed = packed
        context.register_prehook(self._put_back)
        context.register_hook(self._take_off)

    def _put_back(self, _: Any) -> None:
        context = self._context()
        for name, value in self._packed.items():
            parts = [part.read() if type(part) is _Part else part for part in _parts(value)]
            setattr(context, name, _like(value, parts))

    def _take_off(self, *_: Any) -> None:
        context = self._context()
        for name in self._packed:
            delattr(context, name)
        if not backward_keeps_graph():
            self._packed.clear()
