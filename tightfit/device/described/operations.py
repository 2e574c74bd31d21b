"""Operations on fake tensors as they are on a described GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from tightfit._torch_private.described import PLACE, dispatching_as_cuda, kernels
from tightfit.device.described.autocast import cuda_autocast
from tightfit.device.described.gpu import DescribedDevice
from tightfit.device.described.kernels import kernels_of
from tightfit.device.described.names import DeviceNames
from tightfit.device.registry import standing_in


@contextmanager
def as_on(device: DescribedDevice) -> Iterator[None]:
    """Let operations on fake tensors at its place be those of the device, inside the context."""
    with (
        standing_in(device),
        dispatching_as_cuda(DeviceNames),
        cuda_autocast(),
        kernels(kernels_of(device.card.compute_capability), "AutogradCUDA"),
        # FSDP2 looks for streams by the name of the device's type; the processor's do nothing.
        mock.patch.object(torch, PLACE.type, torch.cpu, create=True),
    ):
        yield
