"""PyTorch's profiler."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


def profiler_memory_events(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """List (time in ns, bytes) of each allocation (positive) and free (negative) of host memory, in order of time."""
    host = torch._C._autograd.DeviceType.CPU
    events = _kineto_events(profile)
    return sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type() == host)


def profiler_ranges(profile: torch.profiler.profile, prefix: str) -> dict[str, tuple[int, int]]:
    """Return (start, end) in ns of each `record_function` range whose name starts with `prefix`, by its name."""
    return {
        e.name(): (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in _kineto_events(profile)
        if e.name().startswith(prefix)
    }


def _kineto_events(profile: torch.profiler.profile) -> list[Any]:
    profiler: Any = profile.profiler
    return list(profiler.kineto_results.events())


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library (libkineto) from printing inside: it announces starts and stops, and missing GPUs.

    Whoever has set ``KINETO_LOG_LEVEL`` has chosen what it prints.  Else its level is changed where it lies, and put
    back, so that other profilers print what they always print; where a platform does not show it, nothing is silenced.
    """
    kineto = None if _KINETO_VARIABLE in os.environ else _kineto()
    if kineto is None:
        yield
        return
    library, level = kineto
    before = level.value
    try:
        level.value = _KINETO_SILENT
        if not before:  # the library will be initialised, which sets the level from the variable
            os.environ[_KINETO_VARIABLE] = str(_KINETO_SILENT)
        yield
    finally:
        if before:
            level.value = before
        else:
            os.environ.pop(_KINETO_VARIABLE, None)
            library.suppressLibkinetoLogMessages()  # the level that PyTorch chooses after initialising it


_KINETO_VARIABLE = "KINETO_LOG_LEVEL"


#: Above all that libkineto prints.
_KINETO_SILENT = 99


@cache
def _kineto() -> tuple[ctypes.CDLL, ctypes.c_int] | None:
    """Return libkineto, and the lowest level that it prints; 0 before it is initialised."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        library.suppressLibkinetoLogMessages  # noqa: B018  # AttributeError if there is none
        return library, ctypes.c_int.in_dll(library, "_ZN9libkineto6Logger14severityLevel_E")
    except (OSError, ValueError, AttributeError):
        return None


def profiler_is_running() -> bool:
    """Tell whether a profiler records in this process: only one can."""
    return bool(torch._C._autograd._profiler_enabled())
