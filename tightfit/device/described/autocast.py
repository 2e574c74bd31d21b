"""CUDA's autocast on tensors of a described device: the casts, and the cache of cast weights.

PyTorch's own casts ask each tensor in C++ whether it is on CUDA.  Which operations are cast how is read from PyTorch;
the five ways are those of ``ATen/autocast_mode.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tightfit._torch_private.described import PLACE, autocast_for_cuda, autocast_lists, below_autocast, kernels
from tightfit._torch_private.dispatch import find_overload, schema_of, tree_leaves, tree_map
from tightfit._torch_private.tensors import base_of_view

_NARROW = (torch.float16, torch.bfloat16)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let ``torch.autocast("cuda")`` work on such tensors inside the context."""
    casts = _Casts()
    ways: Mapping[str, Callable[..., Any]] = {
        "LOWER_PRECISION_FP": casts.lower,
        "FP32": casts.single,
        "FP32_SET_OPT_DTYPE": casts.with_dtype,
        "DIFFERENT_REDISPATCH_SIGNATURE": casts.with_dtype,
        "PROMOTE": casts.widest,
    }
    overrides = {
        name: _kernel(way, find_overload(f"aten.{name}" if "." in name else f"aten.{name}.default"))
        for kind, way in ways.items()
        for name in autocast_lists().get(kind, ())
    }
    with autocast_for_cuda(casts.cache.clear), kernels(overrides, "AutocastCUDA"):
        yield


def _kernel(way: Callable[..., Any], overload: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with below_autocast():
            return way(overload, args, kwargs)

    return kernel


class _Casts:
    def __init__(self) -> None:
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By the id of a weight: it, and what it was cast to."""

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not _is_eligible(value) or value.dtype is dtype:
            return value
        is_weight = (
            value.requires_grad and value.is_leaf and value.dtype is torch.float32 and base_of_view(value) is None
        )
        if not is_weight or dtype not in _NARROW or not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        if id(value) not in self.cache:
            self.cache[id(value)] = value, value.to(dtype)
        return self.cache[id(value)][1]

    def _all(self, args: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda leaf: self._cast(leaf, dtype), args)

    def lower(self, overload: Any, args: Any, kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cuda")
        return overload(*self._all(args, dtype), **self._all(kwargs, dtype))

    def single(self, overload: Any, args: Any, kwargs: Any) -> Any:
        return overload(*self._all(args, torch.float32), **self._all(kwargs, torch.float32))

    def with_dtype(self, overload: Any, args: Any, kwargs: Any) -> Any:
        """Have the operation itself widen, where it was not told a dtype."""
        names = [argument.name for argument in schema_of(overload).arguments]
        place = names.index("dtype") if "dtype" in names else None
        given = kwargs.get("dtype") is not None or (place is not None and args[place:] not in ((), (None,)))
        if given or not _is_eligible(args[0]):
            return overload(*args, **kwargs)
        if place is None:
            return self.single(overload, args, kwargs)
        return overload(*args[:place], **{**kwargs, "dtype": torch.float32})

    def widest(self, overload: Any, args: Any, kwargs: Any) -> Any:
        found = [leaf.dtype for leaf in tree_leaves((args, kwargs)) if _is_eligible(leaf)]
        if not found:
            return overload(*args, **kwargs)
        widest = torch.float32 if torch.float32 in found else torch.get_autocast_dtype("cuda")
        return overload(*self._all(args, widest), **self._all(kwargs, widest))


def _is_eligible(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device == PLACE
        and value.dtype.is_floating_point
        and value.dtype is not torch.float64
    )
