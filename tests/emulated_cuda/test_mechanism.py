"""What the engine adds to a step on a GPU, in calls of CUDA and in time until all is submitted."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from tests.emulated_cuda import counters
from tests.support import fixed_costs
from tightfit.device import device_for, stopwatch
from tightfit.device.placement import StreamWatch
from tightfit.profiling import mechanism_cost
from tightfit.profiling.cost_cache import CostCache
from tightfit.replay.contents import checksum


def test_a_streams_handle_is_the_one_that_pytorch_names() -> None:
    device, side = device_for("cuda"), torch.cuda.Stream()
    x = torch.ones(1, device="cuda")
    watch = StreamWatch()
    assert device.current_stream() == torch.cuda.current_stream().cuda_stream
    assert watch.is_same(x)
    with torch.cuda.stream(side):
        assert device.current_stream() == side.cuda_stream
        assert not watch.is_same(x)
    assert watch.is_same(x)


def test_a_checksum_takes_few_launches() -> None:
    x = torch.empty(2**26, device="cuda")  # 256 MB
    checksum(x)
    with counters.counted() as calls:
        checksum(x)
    assert calls.launches < 100


def test_what_the_mechanism_costs_is_measured_on_the_models_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the processor's caches are Python's alone there, however much data an operation has."""
    monkeypatch.delenv("TIGHTFIT_COST_CACHE")
    devices: list[str] = []
    functional = torch.nn.functional
    gelu = functional.gelu
    monkeypatch.setattr(functional, "gelu", lambda x: (devices.append(x.device.type), gelu(x))[1])
    monkeypatch.setattr(stopwatch, "_MOST_RATIO", float("inf"))  # what others disturb is not remembered
    device = torch.device("cuda:0")
    with fixed_costs.measured():
        found = [mechanism_cost.measure_overhead(device, CostCache(device, tmp_path), ratio) for ratio in (0.0, 1.0)]
    assert set(devices) == {"cuda"}
    assert found[0] == found[1]
    assert any(astuple(found[0]))
