"""Decide what may be replayed.  Used when measuring (to plan) and again live (to decide): the live answer counts.

Everything here errs on the side of keeping: an unnecessary keep costs bytes, a wrong replay costs right gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tightfit._torch_private.dispatch import FakeTensor
from tightfit.device.device import Device
from tightfit.operators.differing_calls import reason_of_bar
from tightfit.operators.facts import OpInfo

#: Tensors of which a replay can make new ones.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def blocker(
    info: OpInfo,
    types: Iterable[type],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: list[torch.Tensor],
    device: Device,
    function: Any = None,
) -> str:
    """Return why a call may not be replayed, as a short phrase; empty if it may. `function` as for `kind_of_call`."""
    if info.blocker:
        return info.blocker
    if info.undeclared_writes and info.training_flag < 0:
        return "it writes arguments that its schema does not mark"
    if info.is_foreign and any(isinstance(argument, torch.ScriptObject) for argument in (*args, *kwargs.values())):
        return "an argument that is an object of C++"
    if info.blocker_with_atomics and device.adds_atomically:
        return info.blocker_with_atomics
    if info.is_convolution and (reason := device.convolutions_differ_by_thread()):
        return reason
    if reason := reason_of_bar(info, args, kwargs, device, function):
        return reason
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            return f"a {str(tensor.layout).removeprefix('torch.')} argument"
        if type(tensor) not in PLAIN_TYPES:
            return f"an argument of the tensor subclass {type(tensor).__name__}"
    if any(kind not in PLAIN_TYPES for kind in types):
        return "a tensor subclass"
    return ""


def call_generator(args: tuple[Any, ...], kwargs: dict[str, Any], device: Device) -> torch.Generator | None:
    """Return the generator that a random call draws from; None if it cannot be known."""
    for argument in (*args, kwargs.get("generator")):
        if isinstance(argument, torch.Generator):
            return argument
    return device.generator()
