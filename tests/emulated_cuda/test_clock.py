"""The emulated clock, what measuring finds on it, and steps on it against their predictions.

The host's time is counted in launches and in Python's calls, so that it is the same every time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import tightfit
from tests.emulated_cuda import clock, counters
from tests.support import fixed_costs
from tightfit.device import device_for
from tightfit.profiling.costs import time_alone
from tightfit.records import Plan, Profile
from tightfit.solver.solver import Solver, full_plan
from tightfit.step.step import Step

#: A step's launches take as long as Python's calls, about; copies and large kernels take long enough to get ahead.
HOST = clock.Costs(launch_us=20.0, call_us=0.5, kernel_ps_per_thread=20.0)
#: Calls of libraries (matrix products) take so many times as long as other kernels.
HEAVY = 6.0


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


class Block(nn.Module):
    """Products of matrices, and small kernels between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.norm(x))
        return x + self.down(y * y.sigmoid().tanh())


@dataclass
class Found:
    """What a step took, and what was said."""

    plain_ms: float
    planned_ms: float
    profile: Profile
    full: Plan
    chosen: Plan


@pytest.fixture(scope="module")
def steps() -> dict[float, Found]:
    """By the ratio of the kernels' time to the host's under the full tape, steps on the clock."""
    model = nn.Sequential(*(Block(32) for _ in range(3))).cuda()
    batch = torch.randn(16, 32, device="cuda")
    step = Step(
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    with fixed_costs.measured():
        for _ in range(2):
            step.run(model, batch)
        with clock.ticking(HOST):
            profile = tightfit.measure(model, batch, step=step, cost_cache=False)
            full = full_plan(profile, 2**50)
            host_ms = planned_step_ms(model, batch, step, full)
            with counters.counted() as calls:
                step.run(model, batch)
        found = {}
        for ratio in (0.2, 1.0, 5.0):
            kernel_us = 1e3 * ratio * host_ms / (calls.launches + HEAVY * calls.library_calls)
            with clock.ticking(replace(HOST, kernel_us=kernel_us, library_us=HEAVY * kernel_us)):
                profile = tightfit.measure(model, batch, step=step, cost_cache=False)
                full = full_plan(profile, 2**50)
                solver = Solver(profile)
                least, most = solver.smallest().peak_bytes, solver.plain(0).plain_peak_bytes
                found[ratio] = Found(
                    plain_ms=step_ms(lambda: step.run(model, batch)),
                    planned_ms=planned_step_ms(model, batch, step, full),
                    profile=profile,
                    full=full,
                    chosen=solver.solve((least + most) // 2),
                )
    return found


def planned_step_ms(model: nn.Module, batch: torch.Tensor, step: Step, plan: Plan) -> float:
    with tightfit.apply(model, plan, step=step) as applied:

        def run() -> None:
            applied.loss(model, batch).backward()
            step.run_optimizers(model)

        run()  # checks itself
        return step_ms(run)


def step_ms(run: Callable[[], None]) -> float:
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.2, 1.0, 5.0])
def test_steps_take_what_was_predicted(steps: dict[float, Found], ratio: float) -> None:
    found = steps[ratio]
    assert found.profile.plain_step_ms == pytest.approx(found.plain_ms, rel=0.05)
    assert found.full.predicted_step_ms == pytest.approx(found.planned_ms, rel=0.05)


@pytest.mark.slow
def test_a_tape_costs_what_python_takes_where_the_host_is_behind_and_nothing_where_the_gpu_is(
    steps: dict[float, Found],
) -> None:
    replayed = {op for recipe in steps[5.0].full.recipes for op in recipe.replay}
    assert replayed
    gpu_bound, host_bound = steps[5.0], steps[0.2]
    kernels_ms = sum(recipe_ms(gpu_bound.full))
    added_ms = gpu_bound.planned_ms - gpu_bound.plain_ms
    assert added_ms == pytest.approx(kernels_ms, rel=0.05)
    work = host_bound.profile.plain_work()
    assert sum(work.host_ms) == pytest.approx(host_bound.profile.plain_step_ms, rel=0.05)
    assert host_bound.planned_ms - host_bound.plain_ms > 0.5 * host_bound.plain_ms


def recipe_ms(plan: Plan) -> list[float]:
    return [plan.recipes[region.recipe].replay_ms for region in plan.regions if region.recipe >= 0]


@pytest.mark.slow
def test_what_is_dropped_depends_on_the_ratio(steps: dict[float, Found]) -> None:
    """Where launches are what counts, the product of matrices is as cheap as anything; where kernels are, it is kept."""
    heavy = {}
    for ratio in (0.2, 5.0):
        plan = steps[ratio].chosen
        names = [recipe.op_names[op] for recipe in plan.recipes for op in recipe.replay]
        heavy[ratio] = sum(name.startswith("aten.addmm") for name in names)
        assert names
    assert heavy[5.0] < heavy[0.2]
