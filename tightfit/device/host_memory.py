"""How much memory the machine has, as its system says.

Not by psutil: that cannot be imported where POSIX-only modules are missing from a Linux Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any, NamedTuple


class HostMemory(NamedTuple):
    """The machine's RAM, in bytes."""

    total: int
    free: int
    """What no process uses now; all of it where the system does not say."""


def host_memory_bytes() -> HostMemory:
    """Return the machine's RAM.

    Raises:
        OSError: the system does not say.
    """
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return HostMemory(total, _available() or total)
    windows = getattr(ctypes, "windll", None)
    if windows is not None:
        return _of_windows(windows)
    found = _meminfo("MemTotal:")
    if found is None:
        raise OSError("the system does not say how much memory it has. Give budgets in bytes on another machine.")
    return HostMemory(found, _available() or found)


def _available() -> int | None:
    return _meminfo("MemAvailable:")


def _meminfo(name: str) -> int | None:
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


class _MemoryStatus(ctypes.Structure):
    """``MEMORYSTATUSEX`` of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "free", "total_page", "free_page", "total_virtual")),
        ("free_virtual", ctypes.c_uint64),
        ("free_extended_virtual", ctypes.c_uint64),
    )


def _of_windows(windows: Any) -> HostMemory:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed, so it is not known how much memory there is.")
    return HostMemory(int(status.total), int(status.free))
