"""Memory as an array, without PyTorch taking it for memory from outside."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import torch

from tightfit.step.host_copy import memory_of


def test_memory_is_shared_and_not_marked() -> None:
    data = torch.arange(5, dtype=torch.uint8)
    shown = memory_of(data)
    shown[0] = 9
    assert data.tolist() == [9, 1, 2, 3, 4]
    assert data.untyped_storage().resizable()
    assert memory_of(torch.empty(0, dtype=torch.uint8)).nbytes == 0


def test_memory_outlives_the_callers_tensor() -> None:
    """A copy from a GPU has no other owner."""
    data = torch.full((1 << 20,), 7, dtype=torch.uint8)
    alive = weakref.ref(data)
    shown = memory_of(data)
    del data
    gc.collect()
    assert alive() is not None
    assert bool(np.all(shown == 7))
    del shown
    assert alive() is None
