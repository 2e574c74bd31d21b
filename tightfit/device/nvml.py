"""Ask NVIDIA's driver what each process holds of a GPU, through the library that comes with every driver."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_SUCCESS = 0
_NOT_TOLD = 2**64 - 1
#: There can be more; then the driver says so, and nothing is known.
_MOST_PROCESSES = 256


class _Process(ctypes.Structure):
    """`nvmlProcessInfo_t`."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def process_bytes(uuid: str) -> dict[int, int]:
    """Return what each process that computes on a GPU holds of it, by its number; empty where the driver cannot tell.

    Inside a container the numbers may be those that the processes have outside.

    Args:
        uuid: of the GPU, or of its part (MIG), without the prefix that tells which of the two it is.
    """
    library = _library()
    if library is None:
        return {}
    gpu, count = ctypes.c_void_p(), ctypes.c_uint(_MOST_PROCESSES)
    found = (_Process * _MOST_PROCESSES)()
    names = (f"{prefix}-{uuid}".encode() for prefix in ("GPU", "MIG"))
    try:
        if all(library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(gpu)) != _SUCCESS for name in names):
            return {}
        if library.nvmlDeviceGetComputeRunningProcesses_v3(gpu, ctypes.byref(count), found) != _SUCCESS:
            return {}
    except AttributeError:  # an old driver has no such function
        return {}
    return {one.pid: one.used_bytes for one in found[: count.value] if one.used_bytes != _NOT_TOLD}


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
        return library if library.nvmlInit_v2() == _SUCCESS else None
    except (OSError, AttributeError):
        return None
