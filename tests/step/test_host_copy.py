"""Copies of tensors in host memory are exact, and memory is seen without PyTorch taking it for given away."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from tightfit.step.host_copy import CopyFile, HostCopy, difference, memory_of, same_contents


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


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(300, 7),
        torch.randn(300, 7).t(),
        torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last),
        torch.randn(400, 8)[:, ::2],
        torch.randn(1000).to(torch.bfloat16),
        torch.randn(600, dtype=torch.complex64),
        torch.randn(600, dtype=torch.complex64).conj(),
        torch.arange(1000).bool(),
        torch.full((1000,), float("nan")),
        torch.zeros(1000).neg(),
        torch.randn(1, 300).expand(5, 300),
        torch.randn(()),
        torch.zeros(0, 5),
        torch.eye(40).to_sparse(),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_copies_are_exact(tensor: torch.Tensor) -> None:
    file = CopyFile()
    original = (
        tensor.clone()
        if tensor.layout is not torch.strided
        else tensor.detach().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    )
    first, second = HostCopy(original, file), HostCopy(original, file)
    assert same_contents(first, second)
    loaded = first.load()
    if tensor.layout is torch.strided and tensor.numel():
        changed = original if original.stride() and 0 in original.stride() else original.view_as(original)
        with torch.no_grad():
            target = changed[:1] if 0 in changed.stride() else changed
            target.copy_(torch.ones_like(target) * 3)
        assert not same_contents(first, HostCopy(original, file))
        assert difference(first, HostCopy(original, file)) > 0
    first.restore(original)
    assert same_contents(second, HostCopy(original, file))
    assert same_contents(second, HostCopy(loaded, file))


def test_a_copy_of_another_shape_or_type_is_not_the_same() -> None:
    file = CopyFile()
    a = HostCopy(torch.zeros(300), file)
    assert not same_contents(a, None)
    assert not same_contents(a, HostCopy(torch.zeros(3, 100), file))
    assert not same_contents(a, HostCopy(torch.zeros(300, dtype=torch.int32), file))
    assert difference(a, None) == difference(a, HostCopy(torch.zeros(299), file)) == float("inf")
    assert same_contents(HostCopy(torch.ones(30, 20), file), HostCopy(torch.ones(20, 30).t(), file))
