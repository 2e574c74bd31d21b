"""Tensors of which each process holds a part (`torch.distributed.tensor.DTensor`)."""

from __future__ import annotations

import sys

import torch

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """It is a `DTensor`.  Asking imports nothing: where that package is not loaded, there is none."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a distributed tensor that this process holds; any other tensor itself."""
    if type(tensor) in _PLAIN_TYPES or not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]  # a DTensor's
    return part
