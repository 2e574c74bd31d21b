"""Copies of tensors in host memory are exact, and memory is seen without PyTorch taking it for given away."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tightfit.step import host_copy
from tightfit.step.host_copy import CopyFile, HostCopy, difference, flat_chunks, memory_of, same_contents


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


@pytest.mark.parametrize("in_memory_bytes", [0, 1000, 2**20])
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
def test_copies_are_exact(tensor: torch.Tensor, in_memory_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "_IN_MEMORY_BYTES", in_memory_bytes)
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


class Quantised(torch.Tensor):
    """A weight that is stored as integers and a scale, and knows no operation but what it is asked for here."""

    values: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)  # type: ignore[attr-defined, no-any-return]  # no stub has it

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def test_a_subclass_is_copied_by_the_tensors_that_it_wraps() -> None:
    weight = Quantised(torch.arange(6, dtype=torch.int8).view(2, 3), torch.tensor([0.5]))
    file = CopyFile()
    before = HostCopy(weight, file)
    assert same_contents(before, HostCopy(weight, file))
    weight.values.add_(1)
    weight.scale.mul_(2)
    after = HostCopy(weight, file)
    assert not same_contents(before, after)
    assert difference(before, after) == 1.0
    before.restore(weight)
    assert same_contents(before, HostCopy(weight, file))
    assert weight.values.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [piece.tolist() for piece in flat_chunks(weight)] == [[0, 1, 2, 3, 4, 5], [0.5]]
