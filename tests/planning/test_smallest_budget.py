"""The smallest budget that is named runs, exactly as it was named; and the margin of data-dependent steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.planning import fuzz_smallest
from tests.replay.programs import Program, loss_of
from tightfit import BudgetInfeasible
from tightfit.device import memory as meter
from tightfit.planning.search import confirm_smallest
from tightfit.profiling import costs
from tightfit.profiling.cost_cache import Cost
from tightfit.solver.next_budget import next_useful_bytes
from tightfit.solver.solver import DATA_DEPENDENT_MARGIN, Solver
from tightfit.step.step import Step
from tightfit.units import format_budget, format_bytes, parse_bytes
from tightfit.verification.trial import Trial

Tensor = torch.Tensor

#: Each was short of what it needs, by 8 to 8,456 bytes, before the smallest plan's measured peak was what is named.
PROGRAMS: dict[str, list[tuple[str, int, int]]] = {
    "numbers that autograd saves": [("linear", 0, 0), ("chunks", 0, 0)],
    "checkpointing inside a region": [("chunks", 0, 1), ("attention", 1, 0), ("checkpoint", 0, 2)],
    "a self-check that refuses": [("failed attempt", 1, 1), ("gelu", 1, 2), ("swapped buffer", 3, 1)],
    "several numbers": [("rnn loop", 1, 1), ("fourier", 2, 2), ("data write", 3, 1)],
    "a random mask": [("bernoulli", 3, 0), ("bilinear", 2, 2)],
}


def spec_of(name: str) -> dict[str, Any]:
    return {"code": PROGRAMS[name], "rows": 8, "columns": 32, "form": 0}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_number_that_is_named_is_accepted_and_kept_and_one_byte_less_is_refused(name: str) -> None:
    found = fuzz_smallest.check(spec_of(name))
    assert not found.refused_by_plain
    assert found.problem == ""
    assert found.named_bytes <= found.plain_bytes


@pytest.mark.parametrize("name", ["checkpointing inside a region", "a self-check that refuses"])
def test_a_confirmed_frontier_begins_with_a_budget_that_runs(name: str) -> None:
    model = fuzz_smallest.program(spec_of(name))
    profile = tightfit.measure(model, model.batch, loss=loss_of)
    model = fuzz_smallest.program(spec_of(name))
    with Trial(model, model.batch, Step(loss=loss_of)) as trial:
        profile = confirm_smallest(trial, profile)
    smallest = tightfit.frontier(profile, points=2)[0].budget_bytes
    _, applied = fuzz_smallest.fitted(spec_of(name), smallest)
    applied.remove()


class Observing(nn.Module):
    """Gives its buffer another shape in its first step, as observers of quantisation do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.register_buffer("largest", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.resize_(16)
        self.largest.copy_(x.detach().abs().amax(0))
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def test_a_buffer_that_gets_its_shape_in_the_first_step_is_no_other_model() -> None:
    batch = torch.randn(64, 16)
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.fit(Observing(), batch, budget=1000)
    with tightfit.fit(Observing(), batch, budget=caught.value.required_bytes) as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok is not False


def test_numbers_that_autograd_saves_are_predicted_to_the_byte() -> None:
    model = Program([("linear", 0, 0), ("linear", 0, 0)], 16, 64, 0)
    profile = tightfit.measure(model, model.batch, loss=loss_of)
    plain = Solver(profile).plain(2**40)
    with Trial(model, model.batch, Step(loss=loss_of)) as trial, tightfit.apply(model, plain) as applied:
        assert trial.run_planned(applied).peak_bytes == plain.predicted_peak_bytes


@pytest.mark.parametrize("size", [1, 1023, 1024, 1075, 73_086_566, 73_100_000, 2**30 - 1, 2**30 + 1, 10**13 + 7])
def test_the_text_that_names_a_budget_is_enough(size: int) -> None:
    assert size <= parse_bytes(format_budget(size)) <= size + max(1024, size // 10)
    assert size > 1000 or format_budget(size) == format_bytes(size)


def test_an_estimated_workspace_is_not_scaled_up_from_tiny_operations() -> None:
    """What is estimated too low a trial run repairs; what is estimated too high refuses budgets that run."""
    names, sizes = ["mul", "mul", "mul", "add"], [8, 4 << 20, 64 << 20, 8]
    tiny = {0: Cost(0.1, 24, ()), 3: Cost(0.1, 800, ())}
    assert costs._estimate(2, names, sizes, tiny, timed=True).workspace_bytes <= sizes[2]
    near = {**tiny, 1: Cost(0.1, 1 << 20, ())}
    assert costs._estimate(2, names, sizes, near, timed=True).workspace_bytes == 16 << 20  # of the one nearest in size
    assert costs._estimate(2, ["add", "sub", "mul", "add"], sizes, tiny, timed=True).workspace_bytes == 0


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.kind.startswith("checkpoint"):
                x = x + checkpoint(layer, x, use_reentrant=False, debug=True)  # with which it is left alone
            elif self.kind == "save_on_cpu":
                with torch.autograd.graph.save_on_cpu():
                    x = x + layer(x)
            else:
                x = x + layer(x)
        if self.kind == "data-dependent":
            x = x * (1.0 if float(x.detach().sum()) > -1e30 else 2.0)
        return x.square().mean()


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        ("checkpoint", "torch.utils.checkpoint"),
        ("save_on_cpu", "save_on_cpu"),
        ("nothing", ""),
    ],
)
def test_the_error_says_what_switched_recomputation_off(kind: str, who: str) -> None:
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.fit(Net(kind), torch.randn(8, 16, requires_grad=True), budget=1000)
    assert bool(caught.value.switched_off) is bool(who)
    assert ("beyond tightfit's reach" in str(caught.value)) is bool(who)
    assert who in str(caught.value)


# ------------------------------------------------------------------------------------------------ the margin


@pytest.fixture(scope="module")
def solvers() -> tuple[Solver, Solver]:
    """Of the same step, once told to depend on the data."""
    profile = tightfit.measure(Net("nothing"), torch.randn(256, 16))
    return Solver(profile), Solver(replace(profile, data_dependent=True))


def test_the_margin_refuses_no_budget(solvers: tuple[Solver, Solver]) -> None:
    free, careful = solvers
    smallest = free.minimum_budget()[0]
    assert careful.minimum_budget()[0] == smallest
    assert careful.solve(smallest).predicted_peak_bytes == smallest
    plain_bytes = free.plain(0).plain_peak_bytes
    assert careful.solve(plain_bytes).is_plain
    with pytest.raises(BudgetInfeasible) as caught:
        careful.solve(smallest - 1)
    assert (caught.value.required_bytes, caught.value.budget_bytes) == (smallest, smallest - 1)


def test_the_margin_is_one_of_the_plans_own_peak(solvers: tuple[Solver, Solver]) -> None:
    free, careful = solvers
    resident, smallest = free.profile.baseline_bytes, free.minimum_budget()[0]
    plain_bytes = free.plain(0).plain_peak_bytes
    times = []
    for part in range(6):
        budget = smallest + (plain_bytes - smallest) * part // 5
        plan = careful.solve(budget)
        times.append(plan.predicted_step_ms)
        assert plan.budget_bytes == budget
        if not plan.is_plain and plan.predicted_peak_bytes > smallest:
            left = budget - plan.predicted_peak_bytes
            assert left >= DATA_DEPENDENT_MARGIN * (budget - resident)
            useful = next_useful_bytes(careful, plan, most_solves=3)
            assert useful is not None
            assert careful.solve(useful).predicted_step_ms < plan.predicted_step_ms
    assert times == sorted(times, reverse=True)


def test_a_data_dependent_step_that_fits_plainly_runs_plainly() -> None:
    model, batch = Net("data-dependent"), torch.randn(64, 16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _, plain_bytes = meter.measure_peak(lambda: model(batch).backward(), meter.resident_bytes(model, batch))
    with tightfit.fit(model, batch, budget=plain_bytes) as applied:
        assert applied.profile is not None
        assert applied.profile.data_dependent
        assert applied.plan.is_plain
