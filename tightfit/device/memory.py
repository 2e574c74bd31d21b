"""The independent meter: what a step really holds.  It shares no code with the predictor.

CPU: `torch.profiler`'s memory events, which PyTorch's CPU allocator itself reports.  They start at zero, so the bytes
that were alive before are added: every distinct storage of model, gradients, optimizer state and batch.
CUDA: the caching allocator's peak of reserved bytes, and this process's bytes outside PyTorch (context, libraries).
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from tightfit._torch_private import (
    cuda_process_bytes,
    profiler_is_running,
    profiler_memory_events,
    storage_key,
    tree_leaves,
)
from tightfit.distributed.dtensor import local_shard
from tightfit.errors import UnsupportedInput

Result = TypeVar("Result")


def resident_bytes(
    model: torch.nn.Module,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
) -> int:
    """Bytes of every distinct storage of parameters, buffers, gradients, optimizer state and batch that lives on the
    model's device; of sharded parameters, this process's part.
    """
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    optimizers = optimizer if isinstance(optimizer, Sequence) else [] if optimizer is None else [optimizer]
    for one in optimizers:
        for state in one.state.values():
            tensors += [v for v in (state.values() if isinstance(state, dict) else ()) if isinstance(v, torch.Tensor)]
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif hasattr(leaf, "__dict__"):
            tensors += [v for v in vars(leaf).values() if isinstance(v, torch.Tensor)]
    device = next(model.parameters()).device
    storages = {
        storage_key(t): t.untyped_storage().nbytes()
        for t in map(local_shard, tensors)
        if t.device == device and t.layout is torch.strided
    }
    return sum(storages.values())


def measure_peak(
    fn: Callable[[], Result], resident_bytes: int, device: torch.device | str = "cpu"
) -> tuple[Result, int]:
    """Run `fn` and return its result and the peak, in bytes, in the budget's terms.

    Args:
        fn: what to run, usually one training step.
        resident_bytes: bytes alive before (see `resident_bytes`); used on CPU, where the meter starts at zero.
        device: whose memory to meter.
    """
    if torch.device(device).type == "cuda":
        return _measure_peak_cuda(fn, torch.device(device))
    refuse_second_profiler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = fn()
    level = peak = 0
    for _, nbytes in profiler_memory_events(profile):
        level += nbytes
        peak = max(peak, level)
    return result, resident_bytes + peak


def refuse_second_profiler() -> None:
    """Raise `UnsupportedInput` if a profiler records in this process: starting another would end it."""
    if profiler_is_running():
        raise UnsupportedInput(
            "torch.profiler is recording in this process, and memory on a CPU is measured with that profiler, of which "
            "only one can run. Measure, fit and verify before the profiler starts; planned steps may be profiled."
        )


def _measure_peak_cuda(fn: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    result = fn()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_reserved(device) + non_pytorch_bytes(device)


def non_pytorch_bytes(device: torch.device) -> int:
    """Bytes of this process on a CUDA device that PyTorch's allocator does not manage; 0 where it cannot be told."""
    used = cuda_process_bytes(device)
    return max(0, used - torch.cuda.memory_reserved(device)) if used is not None else 0


def device_memory_bytes(device: torch.device | str) -> int:
    """All memory of a device: the GPU's, or the machine's RAM."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(device: torch.device | str) -> int:
    """Memory of a device that nobody uses now."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return device_memory_bytes(device)


def time_ms(fn: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Wall time of one run in milliseconds, the device's queue emptied before and after."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    fn()
    if cuda:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e3
