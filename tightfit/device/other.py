"""Devices of kinds that nobody registered, such as PyTorch's ``meta``: tensors may be there, a budget may not."""

from __future__ import annotations

import torch

from tightfit.device.cpu import CpuDevice


class OtherDevice(CpuDevice):
    """A device of which only what the host sees is known: nothing on it is taken to give the same bits twice."""

    is_host = False
    adds_atomically = True
    repetitions = 8

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self.kind = torch_device.type  # type: ignore[misc]  # of other subclasses, all devices have the same

    @classmethod
    def count(cls) -> int:
        """Count none: they cannot be asked for."""
        return 0

    def generator(self) -> torch.Generator | None:
        """Return None: what its random operations draw from is unknown."""
        return None

    def random_state_bytes(self) -> int:
        """Return 0."""
        return 0
