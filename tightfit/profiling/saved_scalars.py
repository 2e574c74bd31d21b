"""Count the numbers that autograd saves as tensors: ``x * 0.5`` holds its 0.5 until backward, and no hook sees it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from tightfit._torch_private.dispatch import OpOverload, schema_of

#: Their derivatives need none of their arguments.
_LINEAR = frozenset({"aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::copy_"})
_NUMBER_BYTES = {bool: 1, int: 8, float: 8, complex: 16}


def saved_scalar_bytes(func: Any, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> int:
    """Return the memory of the numbers among the arguments that the schema wants as tensors, if autograd saves them.

    Args:
        func: the operation's overload.
        args: its arguments as it was called.
        tensors: those of them that are tensors.
    """
    places = _tensor_places(func)
    if not places or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return 0
    return sum(_NUMBER_BYTES.get(type(args[place]), 0) for place in places if place < len(args))


@cache
def _tensor_places(func: Any) -> tuple[int, ...]:
    """Return the places of the arguments that are declared as tensors, and may be given as numbers."""
    if not isinstance(func, OpOverload):  # a higher-order operator has none
        return ()
    schema = schema_of(func)
    if schema.name in _LINEAR:
        return ()
    places = tuple(n for n, argument in enumerate(schema.arguments) if str(argument.type) == "Tensor")
    return places if len(places) > 1 else ()
