"""Segments that grow: PyTorch's allocator on the driver's virtual memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.emulated_cuda import counters

MIB = 2**20


@pytest.fixture(autouse=True)
def _expandable_segments() -> Iterator[None]:
    held = counters.begin_without_a_cache()
    _set("expandable_segments:True")
    yield
    del held
    gc.collect()
    torch.cuda.empty_cache()
    _set("expandable_segments:False")


def _set(text: str) -> None:
    # Renamed in PyTorch 2.14.
    of_accelerators = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (of_accelerators or torch.cuda.memory._set_allocator_settings)(text)


def test_a_segment_grows_by_what_is_missing() -> None:
    before = counters.used_bytes()
    assert before == torch.cuda.memory_reserved()
    first = torch.empty(40 * MIB, dtype=torch.uint8, device="cuda")
    assert counters.used_bytes() - before == 40 * MIB
    second = torch.empty(60 * MIB, dtype=torch.uint8, device="cuda")
    assert counters.used_bytes() == torch.cuda.memory_reserved() == before + 100 * MIB
    assert second.data_ptr() == first.data_ptr() + 40 * MIB  # in one segment
    del first, second
    # Without the growing, no free piece would be large enough.
    third = torch.empty(110 * MIB, dtype=torch.uint8, device="cuda")
    assert counters.used_bytes() == torch.cuda.memory_reserved() == before + 120 * MIB
    del third
    torch.cuda.empty_cache()
    assert counters.used_bytes() == torch.cuda.memory_reserved() == before


def test_a_hole_in_a_segment_is_given_back() -> None:
    before = counters.used_bytes()
    held = [torch.empty(40 * MIB, dtype=torch.uint8, device="cuda") for _ in range(3)]
    del held[1]
    torch.cuda.empty_cache()
    assert counters.used_bytes() == torch.cuda.memory_reserved() == before + 80 * MIB


def test_memory_ends_at_the_capacity() -> None:
    free = torch.cuda.mem_get_info()[0]
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(free + 20 * MIB, dtype=torch.uint8, device="cuda")
    used = torch.empty(free - 40 * MIB, dtype=torch.uint8, device="cuda")
    assert used.is_cuda
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(60 * MIB, dtype=torch.uint8, device="cuda")


def test_each_device_has_its_own() -> None:
    before = counters.used_bytes(0), counters.used_bytes(1)
    x = torch.empty(40 * MIB, dtype=torch.uint8, device="cuda:1")
    assert (counters.used_bytes(0), counters.used_bytes(1)) == (before[0], before[1] + 40 * MIB)
    assert x.to("cuda:0").device.index == 0
    assert counters.used_bytes(0) == before[0] + 40 * MIB
