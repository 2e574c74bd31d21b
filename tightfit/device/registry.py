"""The kinds of devices that tightfit knows, and which of them a tensor, a model or a name belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from tightfit.device.cpu import CpuDevice
from tightfit.device.cuda import CudaDevice
from tightfit.device.device import Device
from tightfit.device.other import OtherDevice

#: Every kind, in the order in which ``--device auto`` looks for one.  A new kind is a file of its own and a line here.
KINDS: tuple[type[Device], ...] = (CudaDevice, CpuDevice)


def device_for(thing: torch.device | torch.Tensor | torch.nn.Module | str | Device) -> Device:
    """Return the device of a tensor, of a model's first parameter, or of a `torch.device` or its name.

    >>> device_for("cpu").is_host
    True
    """
    if isinstance(thing, torch.device):
        return _device(thing)
    if isinstance(thing, torch.Tensor):
        return _device(thing.device)
    if isinstance(thing, torch.nn.Module):
        return _device(next(thing.parameters()).device)
    return thing if isinstance(thing, Device) else device_named(thing) or _device(torch.device(thing))


_stand_in: ContextVar[Device | None] = ContextVar("stand_in", default=None)


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Let a device stand for the place of its tensors inside the context, which to others is no device at all."""
    token = _stand_in.set(device)
    try:
        yield
    finally:
        _stand_in.reset(token)


def _device(device: torch.device) -> Device:
    stand_in = _stand_in.get()
    return stand_in if stand_in is not None and stand_in.torch_device == device else _known(device)


@cache
def _known(device: torch.device) -> Device:
    return next((kind for kind in KINDS if kind.kind == device.type), OtherDevice)(device)


def device_named(text: str) -> Device | None:
    """Return the device of a known kind that `text` names; None if it names none."""
    return next((device for kind in KINDS if (device := kind.named(text)) is not None), None)


def devices() -> list[Device]:
    """List the devices of this machine, the processor first."""
    kinds = sorted(KINDS, key=lambda kind: not kind.is_host)
    return [
        device_for(torch.device(kind.kind) if kind.is_host else torch.device(kind.kind, index))
        for kind in kinds
        for index in range(kind.count())
    ]


def preferred_kind() -> type[Device]:
    """Return the kind that ``--device auto`` takes: the first that this machine offers."""
    return next(kind for kind in KINDS if kind.count())


def accelerator_kind(text: str = "auto") -> type[Device]:
    """Return the kind of accelerator that processes share out among them by their local rank.

    It is that of the device that `text` names; where that is none, the first that this machine offers, else the first.
    """
    named = device_named(text)
    if named is not None and not named.is_host:
        return type(named)
    accelerators = [kind for kind in KINDS if not kind.is_host]
    return next((kind for kind in accelerators if kind.count()), accelerators[0])
