"""Which device a call runs on, which generators it draws from, and whether its streams are the same: asked at every
operation that is taped, so the processor's own tensors are told apart in the quickest way there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tightfit._torch_private.dispatch import fake_device_of
from tightfit.device.device import Device
from tightfit.device.registry import device_for

_HOST = device_for(torch.device("cpu"))


def device_of_call(tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> Device:
    """Return where a call runs: where its tensors are (the host's yield to others), else where ``device=`` says."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return device_for(fake_device_of(tensor) or tensor.device)
    if not tensors and kwargs.get("device") is not None:
        return device_for(torch.device(kwargs["device"]))
    return _HOST


def is_on_host(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor lies in the memory of the processor that runs Python."""
    return tensor.is_cpu or device_for(tensor).is_host


def generators_of(tensors: Iterable[torch.Tensor]) -> list[torch.Generator]:
    """List the default generators that a module of these tensors draws from, the host's first."""
    devices = {tensor.device for tensor in tensors if not tensor.is_cpu}
    generators = [device_for(device).generator() for device in devices]
    return [torch.default_generator, *(generator for generator in generators if generator is not None)]


class StreamWatch:
    """Notes the stream that was used on each device, and tells when it is another."""

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: dict[Device, int] = {}

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Tell whether the current stream of the tensor's device is the first that was current when this was asked."""
        if tensor.is_cpu:
            return True
        device = device_for(tensor.device)
        stream = device.current_stream()
        return self._streams.setdefault(device, stream) == stream
