"""Was an error a lack of memory?  Often that is a plain RuntimeError whose message tells, or a MemoryError."""

from __future__ import annotations

import errno

import torch

from tightfit.device.registry import KINDS


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether `error`, or what caused it, is that the process got no more memory, on any device.

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
        if isinstance(error, RuntimeError) and _says_so(str(error)):
            return True
        error = error.__cause__
    return False


def _says_so(message: str) -> bool:
    messages = [kind.out_of_memory_messages for kind in KINDS]
    return any(pattern is not None and pattern.search(message) for pattern in messages)
