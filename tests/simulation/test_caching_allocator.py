"""The caching allocator's model by itself; `tests/emulated_cuda/test_allocator_model.py` holds it against PyTorch's."""

from __future__ import annotations

import pytest

from tightfit.errors import UnsupportedInput
from tightfit.simulation.allocator_settings import AllocatorSettings
from tightfit.simulation.caching_allocator import CachingAllocator, OutOfDeviceMemory

MIB = 2**20


def test_settings_are_read_from_the_text_of_the_environment() -> None:
    text = " expandable_segments:True ,max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2,1024:4,>:8]"
    settings = AllocatorSettings.parse(text + ",pinned_use_background_threads:True,backend:native")
    assert settings.expandable_segments
    assert settings.max_split_bytes == 128 * MIB
    assert [settings.divisions_of(size * MIB) for size in (1, 256, 512, 1024, 2048, 1 << 20)] == [1, 1, 2, 4, 8, 8]
    assert AllocatorSettings.parse("") == AllocatorSettings()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("backend:cudaMallocAsync", "backend:cudaMallocAsync"),
        ("throw_on_cudamalloc_oom:True", "throw_on_cudamalloc_oom"),
        ("expandable_segments:True,some_new_option:7", "some_new_option:7"),
        ("expandable_segments:yes", "expandable_segments:yes"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(UnsupportedInput, match=named) as refused:
        AllocatorSettings.parse(text)
    assert "PYTORCH_ALLOC_CONF" in str(refused.value)


def test_under_a_cap_the_cache_is_flushed_before_memory_runs_out() -> None:
    allocator = CachingAllocator(AllocatorSettings(), cap_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    assert allocator.reserved_bytes == 60 * MIB
    address = allocator.allocate(80 * MIB)
    assert (allocator.retries, allocator.reserved_bytes) == (1, 80 * MIB)
    with pytest.raises(OutOfDeviceMemory, match="in use"):
        allocator.allocate(30 * MIB)
    assert allocator.retries == 2
    allocator.free(address)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.allocated_bytes, allocator.peak_reserved_bytes) == (0, 0, 80 * MIB)


def test_growing_segments_leave_no_slivers() -> None:
    reserved = []
    for text in ("", "expandable_segments:True"):
        allocator = CachingAllocator(AllocatorSettings.parse(text))
        for size in (100, 104, 108, 112):
            addresses = [allocator.allocate(size * MIB) for _ in range(4)]
            for address in addresses:
                allocator.free(address)
        reserved.append(allocator.peak_reserved_bytes)
    assert reserved[1] == 460 * MIB  # 4 x 112, in pages of 20
    assert reserved[0] >= 2 * reserved[1]
