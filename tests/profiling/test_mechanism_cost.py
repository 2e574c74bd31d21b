"""What the mechanism is priced at: between hot and cold, by what the model's operations leave in the caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tightfit.device import stopwatch
from tightfit.profiling.cost_cache import CostCache
from tightfit.profiling.mechanism_cost import _MOST_COLD, Overhead, _cold_by_hot, eviction_ratio, measure_overhead
from tightfit.profiling.processor_caches import core_cache_bytes
from tightfit.records import Op, Storage, Value

CPU = torch.device("cpu")


def touching(*sizes: int) -> float:
    """The ratio of a model whose operations each make one result of so many bytes from nothing."""
    storages = [Storage(nbytes=size, component="activation") for size in sizes]
    values = [Value(storage=i, op=i, output=0) for i in range(len(sizes))]
    ops = [Op(signature=0, outputs=(i,)) for i in range(len(sizes))]
    return eviction_ratio(ops, values, storages)


def test_operations_evict_as_much_as_they_touch_and_at_most_all() -> None:
    whole = core_cache_bytes()
    assert whole >= 1 << 16
    assert touching() == 0
    assert touching(whole // 4) == 0.25
    assert touching(whole, 50 * whole) == 1
    assert touching(0, 2 * whole) == 0.5


def test_a_result_in_its_inputs_memory_is_touched_once() -> None:
    whole = core_cache_bytes()
    storages = [Storage(nbytes=whole // 2, component="activation")]
    values = [Value(storage=0, op=-1, output=0), Value(storage=0, op=0, output=0)]
    ops = [Op(signature=0, inputs=(0,), outputs=(1,))]
    assert eviction_ratio(ops, values, storages) == 0.5


@pytest.mark.usefixtures("measured_costs")
def test_the_price_lies_between_hot_and_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_MOST_RATIO", float("inf"))  # what others disturb is not remembered
    cache = CostCache(CPU, tmp_path)
    hot, middle, cold = (measure_overhead(CPU, cache, ratio) for ratio in (0.0, 0.5, 1.0))
    assert cold.mode_ms_per_op > 0
    assert cold.tape_ms_per_op > 0
    assert middle.tape_ms_per_op == pytest.approx((hot.tape_ms_per_op + cold.tape_ms_per_op) / 2, abs=2e-6)
    assert measure_overhead(CPU, CostCache(CPU, tmp_path), 0.5) == middle  # remembered


def test_towards() -> None:
    assert Overhead(1, 2, 3, 4).towards(Overhead(2, 4, 3, 0), 0.25) == Overhead(1.25, 2.5, 3, 3)


def test_a_busy_machine_makes_no_absurd_price() -> None:
    assert _cold_by_hot(0.02, 0.01) == 2
    assert _cold_by_hot(0.02, -0.01) == _cold_by_hot(0.02, 0.0) == _MOST_COLD
    assert _cold_by_hot(-0.02, 0.01) == 1
