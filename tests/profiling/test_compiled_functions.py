"""Functions that `torch.compile` made, called by an eager model: their callers are kept whole, and say why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit.operators.region_names import LOSS, ROOT
from tightfit.profiling.compiled_calls import REASON
from tightfit.report.plan_table import format_plan
from tightfit.solver.solver import full_plan

# Dynamo's own, when it looks at an argument.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

WIDTH = 16
BATCH = torch.randn(8, WIDTH)

ran: list[type] = []
"""By run of compiled code, the type of its first argument."""


def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        ran.extend(type(arg) for arg in args if isinstance(arg, Tensor) and not isinstance(arg, nn.Parameter))
        return graph.forward(*args)

    return run


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    ran.clear()
    yield
    torch.compiler.reset()


def gate(x: Tensor, y: Tensor) -> Tensor:
    return (x * 1.5 + y).sin() * y.exp() / (1 + x * x)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
    )


class Gated(nn.Module):
    """Attention as it is called with flex_attention: a compiled function between eager projections."""

    def __init__(self, fused: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fused(self.a(x).sin().cos(), x).tanh())


class Layer(nn.Module):
    def __init__(self, fused: Callable[..., Tensor]) -> None:
        super().__init__()
        self.gated, self.mlp = Gated(fused), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.gated(x))


class Net(nn.Module):
    def __init__(self, fused: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(fused) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


@pytest.mark.parametrize("warm", [True, False], ids=["has run", "new"])
def test_the_callers_are_kept_whole_and_the_rest_is_planned(warm: bool) -> None:
    model = Net(torch.compile(gate, backend=backend))
    if warm:
        model(BATCH).backward()
        model.zero_grad()
    before = len(ran)
    profile = tightfit.measure(model, BATCH)
    assert len(ran) == before  # nothing compiled ran without data, or beneath the observer
    callers = [f"layers.{i}.gated" for i in range(3)]
    assert profile.kept_whole == dict.fromkeys(callers, REASON)
    plan = full_plan(profile, 2**40)
    recipes = {region.key: region.recipe for region in plan.regions}
    assert all(recipes[f"{path}#0"] == -1 for path in callers)
    assert any(recipe >= 0 for recipe in recipes.values())
    assert f"kept whole, because {REASON}: {', '.join(callers)}" in format_plan(plan)
    verdict = tightfit.verify(model, BATCH, plan, reference_budget_bytes=2**40)
    assert (verdict.ok, verdict.mismatches, verdict.compared_share) == (True, 0, 1.0)
    assert verdict.replayed_ops > 0
    assert set(ran) == {Tensor}
    with tightfit.apply(model, plan) as applied:
        before = len(ran)
        applied.loss(model, BATCH).backward()
        assert len(ran) - before == 3 * 2  # once a layer, compiled, and not again in backward


def test_a_compiled_function_that_calls_modules_has_no_regions_inside() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = mlp(), mlp()
            self.through = torch.compile(lambda x: self.inner(x).sin(), backend=backend)

        def forward(self, x: Tensor) -> Tensor:
            return (self.outer(x) + self.through(x)).pow(2).mean()

    model = Whole()
    profile = tightfit.measure(model, BATCH)
    assert profile.kept_whole == {ROOT: REASON}
    assert profile.region_paths == (ROOT, "outer")
    verdict = tightfit.verify(model, BATCH, full_plan(profile, 2**40), reference_budget_bytes=2**40)
    assert verdict.ok
    assert verdict.replayed_ops > 0


def test_a_compiled_loss_is_kept_and_the_model_is_planned() -> None:
    square = torch.compile(lambda x: x.sin().square().mean(), backend=backend)
    applied = tightfit.fit(
        mlp(), BATCH, loss=lambda model, batch: square(model(batch)), grad_checkpoint="full",
        reference_budget_bytes=2**40,
    )  # fmt: skip
    with applied:
        assert dict(applied.plan.kept_whole) == {LOSS: REASON}
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert applied.verdict.replayed_ops > 0
    assert set(ran) == {Tensor}


def test_a_budget_that_is_too_small_names_what_stands_in_the_way() -> None:
    with pytest.raises(tightfit.BudgetInfeasible, match=r"because of functions that torch\.compile made"):
        tightfit.fit(Net(torch.compile(gate, backend=backend)), BATCH, budget=1000)
