"""Was an error a lack of memory?  Often that is a plain RuntimeError whose message tells, or a MemoryError."""

from __future__ import annotations

import errno

import torch

from tightfit.device.registry import KINDS

#: What a process says that may not map a library any more, or has no stack for a thread.
_OF_THE_SYSTEM = ("failed to map segment from shared object", "can't start new thread")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether `error`, or what caused it, is that the process got no more memory, on any device.

    >>> is_out_of_memory(MemoryError())
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    >>> is_out_of_memory(ImportError("numpy/x.so: failed to map segment from shared object"))
    True
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
        if isinstance(error, ImportError | RuntimeError) and any(sign in str(error) for sign in _OF_THE_SYSTEM):
            return True
        error = error.__cause__
    return False


def _says_so(message: str) -> bool:
    messages = [kind.out_of_memory_messages for kind in KINDS]
    return any(pattern is not None and pattern.search(message) for pattern in messages)
