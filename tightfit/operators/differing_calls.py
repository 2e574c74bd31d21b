"""Calls that must not be made again by themselves: barred from replay for as long as the process lives."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from tightfit.device.device import Device
from tightfit.operators.facts import OpInfo

#: Arguments that are part of what a call is; of others, only their class.
DESCRIBED = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

#: Why calls of a kind are barred. Of the last two, a second call of the module around them may be the same computation,
#: as that puts back what it finds changed.
GAVE_OTHER_BITS = "it gave other bits when it was run again"
CHANGED_INPUTS = "it changes arguments that it does not say it writes"
DREW_UNSEEN = "it draws random numbers past PyTorch's operators"

_barred: dict[str, dict[Hashable, str]] = {}


def kind_of_call(
    info: OpInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: Device, function: Any = None
) -> Hashable:
    """Return what decides which kernels a call runs: operator, shapes and scalars, and the settings of libraries.

    `function`: the class of an `autograd.Function`, as several may have one name; all compiled graphs do.
    """
    what = info.name if function is None else weakref.ref(function)  # a graph is large, and may be gone before long
    return what, _kind(args), _kind(tuple(sorted(kwargs.items()))), device.kernel_settings()


def bar(
    info: OpInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: Device, function: Any, reason: str
) -> None:
    """Never trust calls of this kind again, for a reason."""
    _barred.setdefault(info.name, {})[kind_of_call(info, args, kwargs, device, function)] = reason


def reason_of_bar(
    info: OpInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: Device, function: Any = None
) -> str:
    """Return why calls of this kind are barred; empty if they are not."""
    kinds = _barred.get(info.name)
    return "" if kinds is None else kinds.get(kind_of_call(info, args, kwargs, device, function), "")


def _kind(argument: Any) -> Hashable:
    if isinstance(argument, torch.Tensor):
        if argument.layout is not torch.strided:
            return argument.layout
        return argument.dtype, argument.device, tuple(argument.size()), tuple(argument.stride())
    if isinstance(argument, list | tuple):
        return tuple([_kind(part) for part in argument])
    return type(argument).__name__, str(argument) if isinstance(argument, DESCRIBED) else ""
