"""What the mechanism is priced at: between hot and cold, by what the model's operations leave in the caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.device import stopwatch
from tightfit.profiling import mechanism_cost
from tightfit.profiling.cost_cache import CostCache, NoCache
from tightfit.profiling.mechanism_cost import _MOST_COLD, Overhead, _cold_by_hot, eviction_ratio, measure_overhead
from tightfit.profiling.processor_caches import core_cache_bytes, run_other_code
from tightfit.records import Op, Storage, Value
from tightfit.step.own_steps import is_own_step

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


@pytest.mark.usefixtures("measured_costs")
def test_backwards_that_are_timed_are_no_steps_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    backward, own = torch.autograd.backward, list[bool]()
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: (own.append(is_own_step()), backward(*a, **k))[1])
    measure_overhead(CPU, NoCache(), 0.0)
    assert set(own) == {True}


@pytest.mark.usefixtures("measured_costs")
def test_an_open_autocast_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = set()
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: (dtypes.add((found := linear(*a)).dtype), found)[1])
    with torch.autocast("cpu", torch.bfloat16):
        measure_overhead(CPU, NoCache(), 0.0)
    assert dtypes == {torch.float32}


@pytest.mark.usefixtures("measured_costs")
def test_a_failure_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        torch.rand(1)
        raise RuntimeError("fails")

    monkeypatch.setattr(mechanism_cost, "_measure_module", fail)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="fails"):
        measure_overhead(CPU, NoCache(), 0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_code_is_run_that_no_mode_sees() -> None:
    class Seen(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ops += 1
            return func(*args, **(kwargs or {}))

    before = torch.get_rng_state()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, Seen() as seen:
        run_other_code()
    assert seen.ops == 0
    assert len({event.name for event in profile.events() if event.name.startswith("aten::")}) > 20
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_towards() -> None:
    assert Overhead(1, 2, 3, 4).towards(Overhead(2, 4, 3, 0), 0.25) == Overhead(1.25, 2.5, 3, 3)


def test_a_busy_machine_makes_no_absurd_price() -> None:
    assert _cold_by_hot(0.02, 0.01) == 2
    assert _cold_by_hot(0.02, -0.01) == _cold_by_hot(0.02, 0.0) == _MOST_COLD
    assert _cold_by_hot(-0.02, 0.01) == 1
