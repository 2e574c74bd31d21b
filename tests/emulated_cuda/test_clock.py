"""The emulated clock, what measuring finds on it, and steps on it against their predictions.

The host's time is counted in launches and in Python's calls, so that it is the same every time.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_clock import COUNTED, RATIOS, Row, Training, rows_of
from tests.emulated_cuda import clock, counters
from tests.support import fixed_costs
from tightfit.device import device_for
from tightfit.profiling.costs import time_alone


def test_the_host_goes_on_until_it_waits() -> None:
    x = torch.ones(8, device="cuda")
    with clock.ticking(clock.Costs(launch_us=2.0, kernel_us=30.0)):
        for _ in range(4):
            x.abs_()
        assert clock.seconds() == pytest.approx(8e-6)
        torch.cuda.synchronize()
        assert clock.seconds() == pytest.approx(122e-6)  # the first launch, and four kernels one after another
        clock.work(50.0)
        x.abs_()
        torch.cuda.synchronize()
        assert clock.seconds() == pytest.approx((122 + 50 + 2 + 30) * 1e-6)
    assert clock.seconds() == 0.0


def test_streams_work_side_by_side_and_wait_for_events() -> None:
    x, y = (torch.ones(8, device="cuda") for _ in range(2))
    side = torch.cuda.Stream()
    with clock.ticking(clock.Costs(kernel_us=100.0)):
        x.abs_()
        with torch.cuda.stream(side):
            y.abs_()
        torch.cuda.synchronize()
        assert clock.seconds() == pytest.approx(100e-6)
        x.abs_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y.abs_()
        side.synchronize()
        assert clock.seconds() == pytest.approx(300e-6)


def test_events_tell_the_time_between_them() -> None:
    x = torch.ones(8, device="cuda")
    with clock.ticking(clock.Costs(launch_us=5.0, kernel_us=40.0)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(3):
            x.abs_()
        end.record()
        end.synchronize()
        assert begin.elapsed_time(end) == pytest.approx(0.125)


def test_without_a_clock_nothing_takes_time() -> None:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.ones(8, device="cuda").abs_()
    end.record()
    end.synchronize()
    assert begin.elapsed_time(end) == pytest.approx(0.01)


@pytest.mark.parametrize("kernel_us", [0.5, 8.0, 300.0])
def test_an_operations_two_times_are_told_apart(kernel_us: float) -> None:
    """Also where the host takes longer than the kernel, which the GPU would wait for."""
    device = device_for("cuda")
    x = torch.ones(8, device="cuda")
    with clock.ticking(clock.Costs(launch_us=6.0, kernel_us=kernel_us, kernel_ps_per_thread=20.0)):
        timer = device.operation_timer(device.timer_bytes())
        for func, launches in ((torch.ops.aten.abs.default, 1), (torch.ops.aten.std.default, 1)):
            with counters.counted() as calls:
                func(x)
            found = time_alone(timer, func, (x,), {}, 3, grad_enabled=True)
            assert calls.launches >= launches
            assert found.host_ms == pytest.approx(6e-3 * calls.launches)
            assert found.device_ms == pytest.approx(kernel_us * 1e-3 * calls.launches, abs=0.05e-3)


def test_a_timer_writes_no_more_than_it_may() -> None:
    device = device_for("cuda")
    assert device.timer_bytes() == 2 * torch.cuda.get_device_properties(0).L2_cache_size
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with clock.ticking(clock.Costs(launch_us=1.0, kernel_us=1.0)):
        timer = device.operation_timer(1 << 20)
        assert torch.cuda.memory_allocated() - before <= 1 << 20
        del timer
        assert torch.cuda.memory_allocated() == before


# ------------------------------------------------------------------------------------------------ steps


@pytest.fixture(scope="module")
def rows() -> dict[tuple[float, str], Row]:
    """By the ratio of the kernels' time to the host's, and the plan."""
    with fixed_costs.measured():
        return {(row.ratio, row.plan): row for row in rows_of(Training.small(), COUNTED)}


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "all dropped", "half-way"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_steps_take_what_was_predicted(rows: dict[tuple[float, str], Row], ratio: float, plan: str) -> None:
    """What a tape's Python takes is known for a mean operation, so that planned steps are less exact."""
    assert abs(rows[ratio, plan].error) <= 0.05


@pytest.mark.slow
def test_a_tape_costs_nothing_where_the_gpu_is_behind_and_all_its_python_where_the_host_is(
    rows: dict[tuple[float, str], Row],
) -> None:
    """What is left where the GPU is behind are the kernels that run again."""
    gpu_bound, host_bound = rows[5.0, "all dropped"], rows[0.2, "all dropped"]
    assert gpu_bound.added_ms - gpu_bound.kernels_ms == pytest.approx(0.0, abs=0.15 * gpu_bound.tape_ms)
    assert host_bound.added_ms == pytest.approx(host_bound.tape_ms, rel=0.05)


@pytest.mark.slow
def test_what_is_dropped_depends_on_the_ratio(rows: dict[tuple[float, str], Row]) -> None:
    """Within the same budget: few launches where they are what counts, little of the GPU's work where that is."""
    gpu_bound, host_bound = rows[5.0, "half-way"], rows[0.2, "half-way"]
    assert gpu_bound.again != host_bound.again
    assert gpu_bound.again
    assert host_bound.again
