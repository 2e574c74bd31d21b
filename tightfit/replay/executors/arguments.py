"""Hold a call's arguments for a second call, without their histories.

A tensor that is written afterwards may come to have the call itself in its history.  Held as it is, it and the call
would keep each other alive.  Hooks that a module puts on its arguments are not put on them twice, either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.tensors import alias_outside_dispatch


class _Held:
    """A tensor among the arguments."""

    __slots__ = ("attributes", "requires_grad", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = alias_outside_dispatch(torch.Tensor, tensor)  # with the same version counter
        self.requires_grad = tensor.requires_grad
        self.attributes = vars(tensor).copy()

    def again(self) -> torch.Tensor:
        fresh = alias_outside_dispatch(torch.Tensor, self.tensor).requires_grad_(self.requires_grad)
        vars(fresh).update(self.attributes)
        return fresh


class Arguments:
    """The arguments of one call: constants, tensors and parameters, or tuples, lists and dicts of them."""

    __slots__ = ("_args", "_kwargs", "_pairs")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held: dict[int, _Held] = {}
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def hold(tensor: torch.Tensor) -> Any:
            if isinstance(tensor, torch.nn.Parameter):
                self._pairs.append((tensor, tensor))
                return tensor
            if id(tensor) not in held:  # modules ask whether two of them are one
                held[id(tensor)] = _Held(tensor)
                self._pairs.append((tensor, held[id(tensor)].tensor))
            return held[id(tensor)]

        self._args, self._kwargs = _mapped((args, kwargs), torch.Tensor, hold)

    def take_tensors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return, once, each of the tensors and what is held of it, whose version is the same."""
        pairs, self._pairs = self._pairs, []
        return pairs

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments that are as those were."""
        fresh: dict[int, torch.Tensor] = {}

        def make(held: _Held) -> torch.Tensor:
            if id(held) not in fresh:
                fresh[id(held)] = held.again()
            return fresh[id(held)]

        args, kwargs = _mapped((self._args, self._kwargs), _Held, make)
        return args, kwargs


def _mapped(argument: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(argument, kind):
        return change(argument)
    if isinstance(argument, tuple | list):
        return type(argument)([_mapped(part, kind, change) for part in argument])
    if isinstance(argument, dict):
        return {name: _mapped(part, kind, change) for name, part in argument.items()}
    return argument
