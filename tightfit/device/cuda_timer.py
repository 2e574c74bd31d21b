"""Times of single operations on a GPU: the host's until they are submitted, and the GPU's by its own clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from tightfit.device.device import Device, OperationTimer, OperationTimes

#: What is written before an operation: so many times the second-level cache.
_FLUSHES = 2
#: How much longer than the operation's launches the GPU is kept busy before it, and how often something is written for
#: that at most.
_AHEAD = 2.0
_MOST_WRITES = 100
#: Runs of nothing, by which the clocks' own time is found, and of a write.
_FIRST_RUNS = 3


def flushing_bytes(device: torch.device) -> int:
    """Return how much has to be written for the second-level cache to hold nothing else."""
    return _FLUSHES * int(torch.cuda.get_device_properties(device).L2_cache_size)


class CudaTimer(OperationTimer):
    """Times operations of one GPU: the host's part by Python's clock, the GPU's between two events.

    Before the first event other memory is written, so that the operation finds its arguments out of the cache; and for
    so long that the operation's launches are submitted meanwhile: the GPU does not wait for them between the events.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        """`nbytes`: of memory to write. With 0 nothing is, and short operations seem as long as their launches."""
        super().__init__(device)
        self._flushed: torch.Tensor | None = None
        with suppress(torch.OutOfMemoryError):
            self._flushed = torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device) if nbytes else None
        self._gain_ms = 0.0  # by which a write puts the GPU behind
        self._empty = OperationTimes(0.0)
        self._empty = self.times_ms(lambda: None, _FIRST_RUNS)
        if self._flushed is not None:
            write = self.times_ms(self._flushed.zero_, _FIRST_RUNS)
            self._gain_ms = write.device_ms - write.host_ms

    def times_ms(
        self, run: Callable[[], object], repeats: int, *, before: Callable[[], object] | None = None
    ) -> OperationTimes:
        """Return the shortest times of some runs."""
        host_ms = device_ms = float("inf")
        self.device.synchronize()
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            host_ms = min(host_ms, (time.perf_counter() - begin) * 1e3)
        host_ms = max(0.0, host_ms - self._empty.host_ms)
        writes = math.ceil(_AHEAD * host_ms / self._gain_ms) if self._gain_ms > 0 else 1
        for _ in range(repeats):
            device_ms = min(device_ms, self._between_events_ms(run, min(1 + writes, _MOST_WRITES)))
        return OperationTimes(host_ms, max(0.0, device_ms - self._empty.device_ms))

    def _between_events_ms(self, run: Callable[[], object], writes: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.device.synchronize()
        if self._flushed is not None:
            for _ in range(writes):
                self._flushed.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
