"""Was an error a lack of memory?  On a CPU that is a plain RuntimeError whose message tells, or a MemoryError."""

from __future__ import annotations

import errno
import re

import torch

_MESSAGES = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|std::bad_alloc|\bbad_alloc\b|bad allocation"
    r"|could not create a (?:memory|primitive)(?! desc)"  # oneDNN; a missing descriptor is an unsupported operation
    r"|out of memory|Cannot allocate memory|failed to allocate"
    r"|CU[A-Z]+_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is that the process got no more memory, on any device.

    >>> is_out_of_memory(MemoryError())
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and _MESSAGES.search(str(error)):
            return True
        error = error.__cause__
    return False
