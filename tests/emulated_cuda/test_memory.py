"""The emulated devices' memory, as PyTorch's caching allocator and the driver account for it."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from tests.emulated_cuda import counters
from tests.emulated_cuda.processes import run_script
from tightfit.device import device_for

MIB = 2**20
GIB = 2**30


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    held = counters.begin_without_a_cache()
    yield
    del held
    gc.collect()
    torch.cuda.empty_cache()


def test_what_an_earlier_step_left_in_a_cycle_is_not_measured() -> None:
    device = device_for("cuda")
    _, before = device.measure_peak(lambda: None, 0)
    gc.disable()
    try:
        ring: list[object] = [torch.empty(50 * MIB, dtype=torch.uint8, device="cuda")]
        ring.append(ring)
        del ring
        _, after = device.measure_peak(lambda: None, 0)
    finally:
        gc.enable()
    assert after == before


def test_used_bytes_are_what_the_allocator_reserved() -> None:
    before = torch.cuda.memory_reserved()
    assert counters.used_bytes() == before
    held = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in (1, 1000, 3 * MIB, 50 * MIB + 1)]
    # The large one has a segment in whole units of 2 MiB; the small ones may lie in one that is there already.
    assert torch.cuda.memory_reserved() - before in [(more + 52) * MIB for more in (0, 2, 20, 22)]
    assert counters.used_bytes() == torch.cuda.memory_reserved()
    del held
    assert counters.used_bytes() == torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert counters.used_bytes() == torch.cuda.memory_reserved() == before


def test_the_peak_is_the_allocators() -> None:
    torch.cuda.reset_peak_memory_stats()
    counters.reset_peak()
    for mib in (40, 200, 80):
        torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda.empty_cache()
    assert counters.peak_bytes() == torch.cuda.max_memory_reserved()
    assert counters.peak_bytes() - counters.used_bytes() == 200 * MIB


def test_one_segment_is_one_malloc() -> None:
    with counters.counted() as calls:
        first = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
        address = first.data_ptr()
        del first
        second = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")  # from the cache
    assert (calls.mallocs, calls.frees, second.data_ptr()) == (1, 0, address)
    del second
    with counters.counted() as calls:
        torch.cuda.empty_cache()
    assert (calls.mallocs, calls.frees) == (0, 1)


def test_memory_ends_at_the_capacity_to_the_byte() -> None:
    free, total = torch.cuda.mem_get_info()
    assert total == torch.cuda.get_device_properties(0).total_memory
    free -= free % (2 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(free + 2 * MIB, dtype=torch.uint8, device="cuda")
    everything = torch.empty(free, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")  # too large for what older segments have left
    del everything
    torch.empty(GIB, dtype=torch.uint8, device="cuda")


def test_settings_say_how_many_devices_and_how_large() -> None:
    script = """
        import torch
        free, total = torch.cuda.mem_get_info(2)
        print(torch.cuda.device_count(), total, total - free)
    """
    assert run_script(script, DEVICES=3, GIB=1.5, CONTEXT_MIB=100).split() == ["3", f"{3 * GIB // 2}", f"{100 * MIB}"]


def test_each_device_has_its_own_memory() -> None:
    assert torch.cuda.device_count() == 2
    first = counters.used_bytes(0)
    x = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda:1")
    assert counters.used_bytes(0) == first
    assert counters.used_bytes(1) == torch.cuda.memory_reserved(1) >= 64 * MIB
    y = x.to("cuda:0")
    assert counters.used_bytes(0) == first + 64 * MIB
    assert (y.device.index, x.device.index) == (0, 1)
    assert torch.cuda.current_device() == 0


def test_device_memory_holds_nothing() -> None:
    x = torch.arange(1, 9, device="cuda")
    assert x.tolist() == [0] * 8
    assert x.sum().item() == 0
    assert bool((x == x).all())  # one byte reads as 1: "equal"
    assert torch.tensor([1.0, 2.0], device="cuda").cpu().tolist() == [0.0, 0.0]


def test_pinned_host_memory_is_real() -> None:
    x = torch.arange(1000).pin_memory()
    assert x.is_pinned()
    assert not torch.arange(3).is_pinned()
    assert x.tolist() == list(range(1000))


def test_with_real_memory_copies_keep_what_they_copy() -> None:
    script = """
        import torch
        x = torch.arange(6)
        there = x.to("cuda:0").to("cuda:1")
        print(there.cpu().tolist(), there.data_ptr() != x.data_ptr())
    """
    assert run_script(script, DEVICES=2, REAL_MEMORY=1) == "[0, 1, 2, 3, 4, 5] True\n"


def test_a_read_by_the_host_kills_the_process_as_on_a_gpu() -> None:
    address = torch.ones(4, device="cuda").data_ptr()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(address, 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


@pytest.mark.parametrize("in_container", [0, 1])
def test_the_context_counts_as_what_the_driver_says_that_it_takes(in_container: int) -> None:
    script = """
        import torch
        from tightfit.device import device_for

        held = torch.empty(100 << 20, dtype=torch.uint8, device="cuda:1")
        for device in map(device_for, ("cuda:0", "cuda:1")):
            print(device.held_bytes() - device.reserved_bytes() >> 20, device.context_bytes() >> 20)
    """
    found = run_script(script, DEVICES=2, CONTEXT_MIB=333, IN_CONTAINER=in_container)
    assert found == "333 333\n333 333\n"


def test_what_libraries_take_for_good_lies_alone() -> None:
    # Operations are timed between others that leave large free segments in the cache.
    script = """
        import torch
        import tightfit

        model = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(512, 512), torch.nn.GELU()).cuda()
        batch = torch.ones(40_000, 512, device="cuda")
        tightfit.measure(model, batch, loss=lambda model, batch: model(batch).sum(), cost_cache=False)
        del model, batch
        torch.cuda.empty_cache()
        large = [one for one in torch.cuda.memory_snapshot() if one["segment_type"] == "large"]
        print(len(large), [block["state"] for segment in large for block in segment["blocks"]])
    """
    assert run_script(script) == "2 ['active_allocated', 'active_allocated']\n"
