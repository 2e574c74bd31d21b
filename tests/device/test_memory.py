"""The independent meter against allocations whose sizes are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tightfit.device import memory as meter

KIB = 1024


def test_the_peak_is_the_highest_level_not_the_sum() -> None:
    def allocate() -> torch.Tensor:
        first = torch.empty(100 * KIB)  # 400 KiB
        del first
        second = torch.empty(50 * KIB)
        third = torch.empty(25 * KIB)
        del third
        return second

    result, peak = meter.measure_peak(allocate, resident_bytes=1000)
    assert peak == 1000 + 400 * KIB
    assert result.numel() == 50 * KIB


def test_memory_freed_inside_counts_below_the_resident_level() -> None:
    held = [torch.empty(100 * KIB)]

    def swap() -> None:
        held.clear()
        held.append(torch.empty(100 * KIB))

    _, peak = meter.measure_peak(swap, resident_bytes=400 * KIB)
    # The profiler does not know the size of what was there before it, or takes it for what lay at the address once.
    assert 400 * KIB <= peak <= 800 * KIB


def test_resident_bytes_count_each_storage_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    weights = 16 * 4 + 2 * 4 * 4
    buffers = 2 * 4 * 4 + 8
    assert meter.resident_bytes(model) == weights + buffers
    batch = torch.zeros(8, 4)
    assert meter.resident_bytes(model, {"x": batch, "again": [batch[1:], batch.t()]}) == weights + buffers + 128
    optimizer = torch.optim.Adam(model.parameters())
    model(batch).sum().backward()
    optimizer.step()
    expected = weights * 4 + buffers + 3 * 4
    assert meter.resident_bytes(model, None, optimizer) == expected
    assert meter.resident_bytes(model, None, [optimizer]) == expected


def test_resident_bytes_count_tensors_that_modules_have_as_attributes() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.RNN(4, 4, bias=False))  # an RNN keeps its weights twice
    alone = meter.resident_bytes(model)
    mask = model[0].mask = torch.ones(4, 4)  # type: ignore[assignment]  # modules take any attribute
    model[1].caches = {"queue": [torch.zeros(8), mask.t()]}  # type: ignore[assignment]  # the same
    model[0].last = model[0](mask)  # type: ignore[assignment]  # what the next step replaces
    assert meter.resident_bytes(model) == alone + 16 * 4 + 8 * 4


def test_an_exception_passes_through_and_the_meter_works_again() -> None:
    with pytest.raises(ZeroDivisionError):
        meter.measure_peak(lambda: 1 / 0, 0)
    assert meter.measure_peak(lambda: torch.empty(KIB).numel(), 0) == (KIB, 4 * KIB)
