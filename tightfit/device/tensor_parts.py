"""What tensor subclasses are made of: quantised weights, jagged tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tightfit._torch_private.dispatch import FakeTensor
from tightfit.distributed.dtensor import is_dtensor, local_shard

#: Of tensors that wrap none.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors that a tensor subclass wraps, by name; none of others.

    A wrapper without PyTorch's flatten protocol has no memory and does not say what it wraps: its attributes do, where
    each of them is a tensor or plainly none and holds none.
    """
    if type(tensor) in PLAIN_TYPES or is_dtensor(tensor):
        return {}
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return {name: getattr(tensor, name) for name in names}
    attributes = getattr(tensor, "__dict__", {})
    found = {name: thing for name, thing in attributes.items() if isinstance(thing, torch.Tensor)}
    hides = any("__slots__" in vars(kind) for kind in type(tensor).__mro__[: -len(torch.Tensor.__mro__)])
    if not found or hides or not all(name in found or _is_plain(thing) for name, thing in attributes.items()):
        return {}
    return {} if has_memory(tensor) else found


def _is_plain(thing: object) -> bool:
    """Tell whether a value holds no tensor."""
    if isinstance(thing, tuple | list):
        return all(_is_plain(one) for one in thing)
    return thing is None or isinstance(thing, int | float | complex | str | torch.dtype | torch.device | torch.layout)


def does_not_flatten(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor wraps others without PyTorch's flatten protocol."""
    return not hasattr(tensor, "__tensor_flatten__") and bool(parts_of(tensor))


def holds_data(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is more than a description, which one on `meta` is not."""
    return not tensor.is_meta


def has_memory(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has memory of its own that can be looked at: a subclass that wraps others has none, whether
    or not it says what it wraps.
    """
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return True
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # "invalid python storage"; sparse ones have no storage
        return False
    return True


def stored_in(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors in whose memory a tensor is: itself, unless it is a subclass that wraps others."""
    parts = parts_of(tensor)
    if not parts:
        yield local_shard(tensor)
    for part in parts.values():
        yield from stored_in(part)
