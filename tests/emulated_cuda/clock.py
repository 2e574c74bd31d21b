"""The emulated runtime's clock: what kernels and the host take, and what time it is."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from unittest import mock

from torch.autograd import set_multithreading_enabled

_this_process = ctypes.CDLL(None)


@dataclass(frozen=True)
class Costs:
    """What work takes."""

    launch_us: float = 0.0
    """The host, for each launch of a kernel, call of a library, or copy."""
    kernel_us: float = 0.0
    """The device, for each kernel and each copy."""
    kernel_ps_per_thread: float = 0.0
    """Further for each of the kernel's threads."""
    library_us: float = 0.0
    """The device, for each call of cuBLAS or cuDNN."""
    ps_per_byte: float = 0.0
    """Further for each byte that is copied or set."""
    of_processor: bool = False
    """The processor's time of this process passes for the host, too."""
    call_us: float = 0.0
    """The host, for each function that Python calls, of its own or in C: so Python's work is the same every time."""


def seconds() -> float:
    """Return the host's time."""
    now = _this_process.emulated_cuda_now_us
    now.restype = ctypes.c_double
    return float(now()) * 1e-6


def work(us: float) -> None:
    """Let the host work so long."""
    _this_process.emulated_cuda_work_us(ctypes.c_double(us))


@contextmanager
def ticking(costs: Costs) -> Iterator[None]:
    """Inside, work takes what is said, and Python's clock is the emulated one."""
    _set(costs)
    profiler = sys.getprofile()
    try:
        # Backward in this thread: a profiler sees no other one that PyTorch starts.
        one_thread = set_multithreading_enabled(False) if costs.call_us else nullcontext()
        with one_thread, mock.patch.object(time, "perf_counter", seconds):
            if costs.call_us:
                sys.setprofile(_counting(costs.call_us))
            yield
    finally:
        sys.setprofile(profiler)
        _set(Costs())


def _counting(call_us: float) -> Callable[[object, str, object], None]:
    spent, us = _this_process.emulated_cuda_work_us, ctypes.c_double(call_us)

    def count(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            spent(us)

    return count


def _set(costs: Costs) -> None:
    *times, of_processor, _ = astuple(costs)
    _this_process.emulated_cuda_set_clock(*map(ctypes.c_double, times), ctypes.c_int(of_processor))
