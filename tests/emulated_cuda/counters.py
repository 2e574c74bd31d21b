"""What the emulated CUDA runtime of this process counts, if there is one."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_this_process = ctypes.CDLL(None)


def begin_without_a_cache() -> list[torch.Tensor]:
    """Give back what earlier tests left in the allocator; what cannot be given back is taken, and returned.

    Small tensors that PyTorch keeps for good (the state of cuDNN's dropout) hold large segments, from which later
    requests would be served.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return [
        torch.empty(block["size"], dtype=torch.uint8, device=f"cuda:{segment['device']}")
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if segment["segment_type"] == "large" and block["state"] == "inactive" and block["size"] > 2**20
    ]


def is_active() -> bool:
    """Tell whether this process runs on the emulated runtime."""
    return hasattr(_this_process, "emulated_cuda_mallocs")


def used_bytes(device: int = 0) -> int:
    """Return the bytes that are taken from the device, without its context."""
    return _of_device("used_bytes", device)


def peak_bytes(device: int = 0) -> int:
    """Return the most bytes that were taken since the start or `reset_peak`."""
    return _of_device("peak_bytes", device)


def reset_peak(device: int = 0) -> None:
    """Let the peak begin at what is used now."""
    _this_process.emulated_cuda_reset_peak(device)


def _of_device(name: str, device: int) -> int:
    function = getattr(_this_process, f"emulated_cuda_{name}")
    function.restype = ctypes.c_size_t
    return int(function(device))


@dataclass
class Calls:
    """How many calls there were: of the allocator's two, kernels, waits for the device, and cuBLAS's and cuDNN's."""

    mallocs: int
    frees: int
    launches: int
    syncs: int
    library_calls: int


def calls() -> Calls:
    """Return the counters since the process began."""
    counts = {}
    for name in Calls.__dataclass_fields__:
        function = getattr(_this_process, f"emulated_cuda_{name}")
        function.restype = ctypes.c_long
        counts[name] = int(function())
    return Calls(**counts)


@contextmanager
def counted() -> Iterator[Calls]:
    """Return counters that, after the context, say what was called inside."""
    before = calls()
    inside = Calls(0, 0, 0, 0, 0)
    yield inside
    after = calls()
    for name in Calls.__dataclass_fields__:
        setattr(inside, name, getattr(after, name) - getattr(before, name))
