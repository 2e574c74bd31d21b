"""What differs between devices: memory, meters, generators, streams, out-of-memory errors; and budgets on them."""

from tightfit.device.device import Device
from tightfit.device.registry import device_for

__all__ = ["Device", "device_for"]
