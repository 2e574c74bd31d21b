"""Filling the processor's caches with other things, as the rest of a model's step does between two of its operations.

In a loop, an operation finds its tensors, and Python its own code and objects, in caches where a training step has long
put other things: elementwise operations then seem up to three times as fast as they are in a step, and Python's own
work up to six times.  A step of little data replaces no data, but code: that alone makes it twice.
"""

from __future__ import annotations

import mmap
import os
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tightfit._torch_private.dispatch import below_autograd, no_function_modes

#: Nearly as much as the last level of common processors holds: with that, what running in a planned region is measured
#: to cost an operation is what it costs in steps of transformers (`make bench` sets predicted beside measured times).
_BYTES = 28 << 20

#: Of a common processor, where the system does not say.
_CORE_BYTES = 1 << 20


def core_cache_bytes() -> int:
    """Size of the cache that a core has for itself (level 2), where Python's code and objects stay between operations
    that touch less.
    """
    try:
        return max(os.sysconf("SC_LEVEL2_CACHE_SIZE"), 0) or _CORE_BYTES
    except (AttributeError, ValueError, OSError):  # not Linux
        return _CORE_BYTES


@cache
def _data() -> npt.NDArray[np.float64]:
    # Straight from the system: no meter of the budget sees it, and freeing a large piece would teach malloc to keep
    # such pieces for itself from then on.  Written, because pages that never were are all one page.
    data = np.frombuffer(_mapped(_BYTES), dtype=np.float64)
    data[:] = 1.0
    return data


def _mapped(size_bytes: int) -> mmap.mmap:
    """Return that much memory, or where the address space is limited as much as there is: times are worse without."""
    try:
        return mmap.mmap(-1, size_bytes)
    except OSError:
        if size_bytes <= mmap.PAGESIZE:
            raise
        return _mapped(size_bytes // 2)


def fill_caches() -> None:
    """Read other data through the caches."""
    _data().sum()


def run_other_code() -> None:
    """Run operations of many kinds on next to no data, which no mode sees."""
    with no_function_modes(), below_autograd():
        x, image = torch.ones(4, 8), torch.ones(1, 2, 5, 5)
        rows = torch.arange(2)
        F.softmax(x, -1).sort()
        F.embedding(rows, x).cumsum(0)
        F.conv2d(image, image[:, :, :3, :3]).mean((2, 3)).pow(2).rsqrt()
        F.max_pool2d(F.group_norm(image, 1), 2)
        torch.where(x > 0, F.silu(x), -x).index_select(0, rows).sum().item()
        torch.stack([torch.einsum("ij,kj->ik", x, x), x.mm(x.t())]).to(torch.bfloat16).float()


def forget() -> None:
    """Free the data."""
    _data.cache_clear()
