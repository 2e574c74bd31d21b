"""A device that an operation has broken, run alone on made-up data: nothing can go on there in this process."""

from __future__ import annotations

import torch

from tightfit.device import Device
from tightfit.errors import DeviceLost, first_line
from tightfit.profiling.signatures import Call


class BrokenBy(Exception):
    """Running a call alone has broken the device."""

    def __init__(self, call: Call) -> None:
        super().__init__(str(call.func))
        self.call = call


def require_usable(device: Device, call: Call) -> None:
    """Raise `BrokenBy` if the call, which failed, has broken the device: then waiting for it fails, too."""
    try:
        device.synchronize()
    except RuntimeError as error:
        raise BrokenBy(call) from error


def device_lost(broken: BrokenBy, device: torch.device) -> DeviceLost:
    """Return what to raise, with what to do."""
    return DeviceLost(
        f"{broken.call.func}, run alone on made-up data to measure it, has broken the device {device} for this process "
        f"({first_line(broken.__cause__ or broken)}). Nothing that uses the device can go on here. Start the "
        f"program again: the operation is noted in the cost cache, and will be estimated instead of run. Without a "
        f"cost cache it would be run again. Please report this operation."
    )
