"""What may be replayed.  Used when measuring (to plan) and again live (to decide): the live answer counts.

Everything here errs on the side of keeping: an unnecessary keep costs bytes, a wrong replay costs right gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tightfit._torch_private import FakeTensor
from tightfit.operators.facts import OpInfo

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def blocker(info: OpInfo, types: Iterable[type], tensors: list[torch.Tensor], device_type: str) -> str:
    """Why this call may not be replayed, as a short phrase; empty if it may."""
    if info.blocker:
        return info.blocker
    if device_type != "cpu" and info.blocker_on_cuda:
        return info.blocker_on_cuda
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            return f"a {str(tensor.layout).removeprefix('torch.')} argument"
        if type(tensor) not in _PLAIN_TYPES:
            return f"an argument of the tensor subclass {type(tensor).__name__}"
    if any(kind not in _PLAIN_TYPES for kind in types):
        return "a tensor subclass"
    return ""


def call_device(tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> torch.device:
    """The device on which a call runs: of its tensors (a 0-dimensional CPU tensor yields to others), else `device=`."""
    found = torch.device("cpu")
    for tensor in tensors:
        found = tensor.device
        if found.type != "cpu":
            return found
    if not tensors and kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return found


def call_generator(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> torch.Generator | None:
    """The generator that a random call draws from; None if it cannot be known."""
    for argument in (*args, kwargs.get("generator")):
        if isinstance(argument, torch.Generator):
            return argument
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return None
