"""Meters of host memory: `torch.profiler`'s memory events, which PyTorch's CPU allocator itself reports.

They start at zero, so the bytes that were alive before are added.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from tightfit._torch_private.profiler import (
    profiler_is_running,
    profiler_memory_events,
    profiler_ranges,
    quiet_profiler,
)
from tightfit.errors import UnsupportedInput

Result = TypeVar("Result")

_PREFIX = "tightfit-op-"


def measure_host_peak(fn: Callable[[], Result], resident_bytes: int) -> tuple[Result, int]:
    """Run `fn` and return its result and the peak in bytes, `resident_bytes` of it alive before."""
    with host_peak_meter() as meter:
        result = fn()
    return result, resident_bytes + meter.peak_bytes


@contextmanager
def host_peak_meter() -> Iterator[HostPeak]:
    """Meter what runs inside; what was found is there after its end."""
    found = HostPeak()
    with _profiling() as profile:
        yield found
    for _, nbytes in profiler_memory_events(profile):
        found.level_bytes += nbytes
        found.peak_bytes = max(found.peak_bytes, found.level_bytes)


@dataclass
class HostPeak:
    """What was held above the bytes that were alive at the meter's beginning."""

    peak_bytes: int = 0
    """The most."""
    level_bytes: int = 0
    """At its end."""


@contextmanager
def host_workspace_meter() -> Iterator[HostWorkspaceMeter]:
    """Meter the workspace of operations that run one after another inside, on the processor."""
    with _profiling() as profile:
        yield HostWorkspaceMeter(profile)


class HostWorkspaceMeter:
    """Meters operations in one run of the profiler, as starting it takes longer than most of them do."""

    def __init__(self, profile: torch.profiler.profile) -> None:
        self._profile = profile

    def watch(self, index: int) -> AbstractContextManager[object]:
        """Meter the operation that runs inside; what it returned must still be alive at the end."""
        watch: AbstractContextManager[object] = torch.profiler.record_function(f"{_PREFIX}{index}")
        return watch

    def workspace_bytes(self) -> dict[int, int]:
        """Return, by index, the most that each held beyond what it returned; ask after the meter's end."""
        ranges = profiler_ranges(self._profile, _PREFIX)
        events = profiler_memory_events(self._profile)
        position = 0
        found: dict[int, int] = {}
        for name, (start, end) in sorted(ranges.items(), key=lambda item: item[1]):
            level = peak = 0
            while position < len(events) and events[position][0] < start:
                position += 1
            while position < len(events) and events[position][0] <= end:
                level += events[position][1]
                peak = max(peak, level)
                position += 1
            found[int(name.removeprefix(_PREFIX))] = max(0, peak - max(level, 0))
        return found


@contextmanager
def _profiling() -> Iterator[torch.profiler.profile]:
    """Profile memory inside.  Only what the profiler itself says is silenced, not what runs inside."""
    _refuse_second_profiler()
    with _silent():
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        profile.__enter__()
    try:
        yield profile
    finally:
        with _silent():
            profile.__exit__(None, None, None)


@contextmanager
def _silent() -> Iterator[None]:
    with quiet_profiler(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refuse_second_profiler() -> None:
    """Raise `UnsupportedInput` if a profiler records in this process: starting another would end it."""
    if profiler_is_running():
        raise UnsupportedInput(
            "torch.profiler is recording in this process, and memory on a CPU is measured with that profiler, of which "
            "only one can run. Measure, fit and verify before the profiler starts; planned steps may be profiled."
        )
