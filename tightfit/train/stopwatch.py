"""Mean time of the steps since the last logged one."""

from __future__ import annotations

import time

import torch

from tightfit.device import device_for


class Stopwatch:
    """Adds up the time of steps, and gives their mean."""

    def __init__(self, device: torch.device) -> None:
        self._device = device_for(device)
        self._seconds = 0.0
        self._steps = 0

    def add(self, seconds: float) -> None:
        """A step took so long, as far as this process could tell without waiting for the device."""
        self._seconds += seconds
        self._steps += 1

    def settle(self) -> None:
        """Wait for the device, so that work handed to it counts for the steps that handed it over."""
        if self._steps:
            started = time.perf_counter()
            self._device.synchronize()
            self._seconds += time.perf_counter() - started

    @property
    def mean_ms(self) -> float:
        """0.0 when there was no step."""
        return self._seconds / self._steps * 1000 if self._steps else 0.0
