"""Sharded tensors (`torch.distributed.tensor.DTensor`)."""

from __future__ import annotations

import sys

import torch

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is a `DTensor`, without importing that package: where it is not loaded, none exists."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a `DTensor`, and any other tensor itself."""
    if type(tensor) in _PLAIN_TYPES or not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        shard: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]  # a DTensor's
    return shard
