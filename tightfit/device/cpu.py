"""The processor, and host memory."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, TypeVar

import torch

from tightfit.device.device import Device, WorkspaceMeter
from tightfit.device.fp32_precision import fp32_precision
from tightfit.device.host_memory import host_memory_bytes
from tightfit.device.host_meter import host_workspace_meter, measure_host_peak

Result = TypeVar("Result")


class CpuDevice(Device):
    """The processor.  PyTorch's allocator gives memory back to the system, so that nothing is reserved."""

    kind = "cpu"
    label = "CPU"
    is_host = True
    adds_atomically = False
    repetitions = 1
    out_of_memory_messages = re.compile(
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory"
        r"|std::bad_alloc|\bbad_alloc\b|bad allocation"
        r"|could not create a (?:memory|primitive)(?! desc)"  # oneDNN; a missing descriptor is an unsupported operation
        r"|Cannot allocate memory|failed to allocate",
        re.IGNORECASE,
    )

    @classmethod
    def count(cls) -> int:
        """Count one."""
        return 1

    @classmethod
    def random_states(cls) -> list[torch.Tensor]:
        """Copy nothing: the host's generator is looked after by `torch.get_rng_state`, as on every machine."""
        return []

    @classmethod
    def set_random_states(cls, states: Sequence[torch.Tensor]) -> None:
        """Do nothing."""

    def name(self) -> str:
        """Name the processor, as Linux tells it."""
        return _processor()

    def capacity_bytes(self) -> int:
        """Return all RAM of the machine."""
        return host_memory_bytes().total

    def free_bytes(self) -> int:
        """Return the RAM that no process uses now; all of it where the system does not say."""
        return host_memory_bytes().free

    def reserved_bytes(self) -> int:
        """Return 0."""
        return 0

    def measure_peak(
        self, fn: Callable[[], Result], resident_bytes: int, *, from_empty: bool = True
    ) -> tuple[Result, int]:
        """Run `fn` under the profiler; see `Device.measure_peak`."""
        return measure_host_peak(fn, resident_bytes)

    def workspace_meter(self) -> AbstractContextManager[WorkspaceMeter]:
        """Return a meter that profiles the operations inside the context."""
        return host_workspace_meter()

    def synchronize(self) -> None:
        """Do nothing: an operation is done when its call returns."""

    def cost_key(self) -> dict[str, str]:
        """Return the processor, the instructions that PyTorch uses of it, whether oneDNN is used, and how precisely."""
        onednn: Any = torch.backends.mkldnn
        return {
            "device": f"{self.name()} {torch.backends.cpu.get_cpu_capability()}",
            "libraries": f"onednn {onednn.enabled}",
            "precision": fp32_precision(matmul=onednn.matmul, conv=onednn.conv, rnn=onednn.rnn),
        }

    def generator(self) -> torch.Generator | None:
        """Return PyTorch's default generator."""
        return torch.default_generator

    def random_state_bytes(self) -> int:
        """Return the size of the Mersenne twister's state, a tensor in host memory."""
        return torch.default_generator.get_state().numel()

    def make_current(self) -> None:
        """Do nothing: there is no other."""


@cache
def _processor() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return name
