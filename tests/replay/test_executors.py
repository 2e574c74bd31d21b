"""The executors' interface: a recipe is carried out by whom it names, or the plan is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.replay.helpers import differences, snapshot
from tightfit import Plan, PlanMismatch
from tightfit.records import Action, Recipe
from tightfit.replay import executors
from tightfit.replay.executors import EXECUTORS, RegionCall
from tightfit.replay.executors.module_state import NO_MOVES, Moves
from tightfit.simulation.levers import LEVERS
from tightfit.solver.solver import full_plan
from tightfit.verification.comparison import paths_called_again


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.pow(2).mean()


def batch() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def planned(**changes: Any) -> Plan:
    """A plan that drops everything, with its recipes changed."""
    plan = full_plan(tightfit.measure(Net(), batch()), 2**40)
    return replace(plan, recipes=tuple(replace(recipe, **changes) for recipe in plan.recipes))


def step(model: Net, applied: tightfit.Applied | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    loss = model(batch()) if applied is None else applied.loss(model, batch())
    loss.backward()
    return {**snapshot(model, loss), "random state": torch.get_rng_state()}


class Keeping:
    """Makes each call as it is, and counts."""

    name = "keeping"
    actions = frozenset(Action)
    on_tape = False

    def __init__(self) -> None:
        self.calls = 0

    def accepts(self, call: RegionCall | None) -> bool:
        return call is not None

    def find_moves(self, call: RegionCall, recipe: Recipe) -> Moves:
        return NO_MOVES

    def run(self, call: RegionCall, recipe: Recipe) -> Any:
        self.calls += 1
        return call.run_forward()


def test_what_carries_out_each_lever_exists() -> None:
    assert {lever.executor for lever in LEVERS} <= {executor.name for executor in EXECUTORS}


def test_a_plan_file_with_an_executor_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    planned(executor="wishing").save(tmp_path / "plan.json")
    model = Net()
    with pytest.raises(PlanMismatch, match=r"an executor 'wishing', which .*Nothing here can .*Solve again"):
        tightfit.apply(model, Plan.load(tmp_path / "plan.json"))
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_executor_is_not_asked_for_what_it_cannot_do() -> None:
    with pytest.raises(PlanMismatch, match=r"'tape' to offload saved values, which it cannot do"):
        tightfit.apply(Net(), planned(offload=((0, 0),)))


def test_a_further_executor_carries_out_the_recipes_that_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keeping = Keeping()
    monkeypatch.setattr(executors, "EXECUTORS", (*EXECUTORS, keeping))
    model = Net()
    plain = step(model)
    with tightfit.apply(model, planned(executor=keeping.name)) as applied:
        assert not differences(plain, step(model, applied))
    assert keeping.calls == len(model.blocks)
    # The proof allows for what a second call of a module may leave, whoever makes it.
    assert paths_called_again(planned(executor=keeping.name)) == {f"blocks.{place}" for place in range(3)}
    assert paths_called_again(planned()) == set()
