"""What a budget means: more memory never costs time, memory is used or the plan says why not, the parts add up."""

from __future__ import annotations

import gc
import pickle
import sys
import tracemalloc
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.suite import build
from tightfit import BudgetInfeasible
from tightfit.peak_breakdown import PARTS, format_parts, parts_of_peak
from tightfit.records import Plan, Profile
from tightfit.solver.next_budget import next_useful_bytes
from tightfit.solver.solver import Solver, full_plan

Tensor = torch.Tensor

#: A transformer with dropout, in-place operations and BatchNorm, routing by the data, one fused kernel for everything.
MODELS = ["gpt", "resnet", "mixtral", "lstm"]


@cache
def solver_of(name: str) -> Solver:
    case = build(name)
    profile = tightfit.measure(case.model, case.batch, loss=case.loss, optimizer=case.optimizers())
    return Solver(profile)


def budgets(solver: Solver, count: int = 6) -> list[int]:
    smallest, plain = solver.minimum_budget()[0], solver.plain(2**40).plain_peak_bytes
    return sorted({smallest + (plain - smallest) * step // count for step in range(count + 1)})


@pytest.mark.parametrize("name", MODELS)
def test_more_memory_never_costs_time(name: str) -> None:
    solver = solver_of(name)
    plans = [solver.solve(budget) for budget in budgets(solver)]
    times = [plan.predicted_step_ms for plan in plans]
    assert times == sorted(times, reverse=True)
    assert plans[-1].is_plain
    for plan in plans:
        assert plan.predicted_peak_bytes <= plan.budget_bytes
        assert plan.lower_bound_ms <= plan.predicted_step_ms


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_memory_is_used_or_buys_nothing(name: str) -> None:
    """A binding budget is used to 97 %, or the next byte count that buys time is beyond it, and is named."""
    solver = solver_of(name)
    for budget in budgets(solver, 4)[1:-1:2]:
        plan = solver.solve(budget)
        useful = next_useful_bytes(solver, plan, most_solves=64)
        if useful is None:
            assert plan.predicted_step_ms == solver.plain(budget).predicted_step_ms
            continue
        assert useful > budget
        assert solver.solve(useful).predicted_step_ms < plan.predicted_step_ms
        assert solver.solve(useful - 1).predicted_step_ms == plan.predicted_step_ms
        if plan.predicted_peak_bytes < 0.97 * budget:
            between = [budget + (useful - 1 - budget) * step // 3 for step in range(4)]
            assert {solver.solve(b).predicted_step_ms for b in between} == {plan.predicted_step_ms}


@pytest.mark.parametrize("name", MODELS)
def test_the_smallest_budget_is_solvable_and_one_byte_less_is_not(name: str) -> None:
    solver = solver_of(name)
    smallest, where = solver.minimum_budget()
    assert solver.solve(smallest).predicted_peak_bytes == smallest
    with pytest.raises(BudgetInfeasible) as caught:
        solver.solve(smallest - 1)
    error = caught.value
    assert (error.required_bytes, error.where) == (smallest, where)
    assert sum(error.breakdown.values()) == smallest
    parts = parts_of_peak(error.breakdown, where)
    assert sum(parts.values()) == smallest
    for part, size in parts.items():
        assert not size or format_parts({part: size}) in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.breakdown) == (str(error), error.breakdown)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_a_peak_add_up(name: str) -> None:
    solver = solver_of(name)
    for budget in budgets(solver, 2):
        plan = solver.solve(budget)
        parts = parts_of_peak(plan.breakdown, plan.peak_where)
        assert tuple(parts) == PARTS
        assert sum(parts.values()) == plan.predicted_peak_bytes
        assert parts["parameters"] == solver.profile.baseline["parameters"]
        assert parts["gradients"] == solver.profile.baseline["gradients"]
        assert parts["optimizer state and temporaries"] >= solver.profile.baseline["optimizer_state"]
        assert min(parts.values()) >= 0


def test_an_optimizers_temporaries_are_its_own() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    profile = tightfit.measure(model, torch.randn(2, 64), loss=lambda m, b: m(b).sum(), optimizer=optimizer)
    plan = tightfit.solve(profile, 2**30)
    assert plan.peak_where == "optimizer step"
    parts = parts_of_peak(plan.breakdown, plan.peak_where)
    weights = profile.baseline["parameters"]
    assert 2.9 * weights < parts["optimizer state and temporaries"] < 3.1 * weights  # two moments, and once more
    assert parts["values kept"] == parts["replay transient"] == 0


def test_a_part_that_is_not_known_is_other() -> None:
    assert parts_of_peak({"something new": 3}, "")["other"] == 3
    assert format_parts(parts_of_peak({}, "")) == "nothing"


def test_an_error_without_a_breakdown_keeps_its_three_beats() -> None:
    error = BudgetInfeasible(100, 10, "layers.0#0")
    assert "set by layers.0#0. Give at least 100 bytes" in str(error)
    assert error.breakdown == {}


# ------------------------------------------------------------------------------------------------ host memory of tapes


class Mixed(nn.Module):
    """Operations with one saved value, with several, with none, random ones, in-place ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.linear = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.linear.weight[0]
        for _ in range(24):
            if self.kind == "elementwise":
                x = torch.tanh(x * 1.1)
            elif self.kind == "linear":
                x = self.linear(x)
            elif self.kind == "norm":
                x = self.norm(x).mul(1.5).add_(1.0)
            elif self.kind == "dropout":
                x = nn.functional.dropout(x, 0.1)
            else:
                x = nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        return x


def heap_bytes(model: nn.Module, batch: Tensor, applied: tightfit.Applied) -> int:
    """Python heap that a forward leaves for its backward."""
    applied.loss(model, batch).backward()
    gc.freeze()  # what there was before need not be looked through
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        loss = applied.loss(model, batch)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    loss.backward()
    return held


@pytest.mark.parametrize("kind", ["elementwise", "linear", "norm", "dropout", "attention"])
def test_the_tapes_own_host_memory_is_stated_and_bounded(kind: str) -> None:
    model = nn.ModuleList([Mixed(kind)])
    batch = torch.randn(8, 16)

    def loss_of(m: Any, b: Tensor) -> Tensor:
        return m[0](b).sum()

    with tightfit.fit(model, batch, budget="1GiB", grad_checkpoint="full", loss=loss_of) as applied:
        assert applied.verdict is not None
        stated, counted = applied.plan.tape_host_bytes, applied.verdict.tape_host_bytes
        planned = heap_bytes(model, batch, applied)
        with applied.paused():
            plain = heap_bytes(model, batch, applied)
    held = planned - plain
    assert 0.25 * stated < held <= stated
    assert held <= counted <= 2 * stated


def test_a_plain_plan_has_no_tape() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    profile = tightfit.measure(model, torch.randn(2, 4), loss=lambda m, b: m(b).sum())
    plan = tightfit.solve(profile, 2**30)
    assert plan.tape_host_bytes == 0


# ------------------------------------------------------------------------------------------------ no leak


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(8), nn.Tanh()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@pytest.mark.slow
def test_a_thousand_planned_steps_leak_nothing_with_the_collector_off() -> None:
    model, batch = Small(), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    profile: Profile = tightfit.measure(model, batch, optimizer=optimizer)
    plan: Plan = full_plan(profile, 2**30)

    def steps(applied: tightfit.Applied, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=False)
            applied.loss(model, batch).backward()
            optimizer.step()

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    with tightfit.apply(model, plan) as applied:
        assert applied.installed
        steps(applied, 30)
        gc.collect()
        gc.disable()
        try:
            steps(applied, 10)
            tensors_before, objects_before = tensors(), len(gc.get_objects())
            steps(applied, 480)
            blocks_before = sys.getallocatedblocks()  # Python's free lists are full by now
            steps(applied, 480)
            blocks_after = sys.getallocatedblocks()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile_of_memory:
                steps(applied, 10)
            assert tensors() == tensors_before
            assert len(gc.get_objects()) - objects_before < 500  # less than one object a step
            assert blocks_after - blocks_before < 960  # of Python's heap: a plain step itself leaves one
        finally:
            gc.enable()
    assert applied.statistics.replayed_ops > 0
    held: Any = profile_of_memory.profiler
    assert sum(e.nbytes() for e in held.kineto_results.events() if e.name() == "[memory]") == 0
