"""Transforms of `torch.func` over a planned model: results are plain's, the plan stays, a lost budget is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import tightfit
from tests.support.chains import ResidualMLP
from tightfit.errors import PromiseWarning

BATCH = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return ResidualMLP(2)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Part of it outside the model, where the plan recomputes, too."""
    found: Tensor = model(batch).sin().exp().sum()
    return found


def gradient(model: nn.Module) -> list[Tensor]:
    return list(grad(lambda ps: loss_of(lambda x: functional_call(model, ps, (x,)), BATCH))(weights(model)).values())  # type: ignore[arg-type]  # it is called as a model is


def gradients_of_samples(model: nn.Module) -> list[Tensor]:
    def of_one(ps: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(model, ps, (x[None],)).sum()
        return found

    return list(vmap(grad(of_one), (None, 0))(weights(model), BATCH).values())


def push_forward(model: nn.Module) -> list[Tensor]:
    tangents = {name: torch.ones_like(weight) for name, weight in weights(model).items()}
    return list(jvp(lambda ps: functional_call(model, ps, (BATCH,)), (weights(model),), (tangents,)))


def pull_back(model: nn.Module) -> list[Tensor]:
    result, pull = vjp(lambda ps: functional_call(model, ps, (BATCH,)), weights(model))
    return [result, *pull(torch.ones_like(result))[0].values()]


def jacobian(model: nn.Module) -> list[Tensor]:
    return list(jacrev(lambda ps: functional_call(model, ps, (BATCH,)))(weights(model)).values())


def curvature(model: nn.Module) -> list[Tensor]:
    return [hessian(lambda x: functional_call(model, weights(model), (x,)).sum())(BATCH[:1])]


def ensemble(model: nn.Module) -> list[Tensor]:
    stacked = {name: torch.stack([weight, 1.5 * weight]) for name, weight in weights(model).items()}
    return [vmap(lambda ps: functional_call(model, ps, (BATCH,)))(stacked)]


def samples_one_by_one(model: nn.Module) -> list[Tensor]:
    vmap(lambda x: model(x[None]))(BATCH).sin().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def called_with_others(model: nn.Module) -> list[Tensor]:
    own = {name: weight.requires_grad_() for name, weight in weights(model).items()}
    functional_call(model, own, (BATCH,)).sum().backward()
    return [weight.grad for weight in own.values() if weight.grad is not None]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


TRANSFORMS: list[Callable[[nn.Module], list[Tensor]]] = [
    gradient, gradients_of_samples, push_forward, pull_back, jacobian, curvature, ensemble, samples_one_by_one,
]  # fmt: skip


@pytest.fixture(scope="module")
def planned() -> tuple[nn.Module, tightfit.Applied]:
    model = model_of()
    applied = tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full")
    assert any(region.key.startswith("<loss>") and region.recipe >= 0 for region in applied.plan.regions)
    return model, applied


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # jvp compiles its rules at first use
@pytest.mark.parametrize("transform", [*TRANSFORMS, called_with_others])
@pytest.mark.parametrize("in_step", [False, True])
def test_results_are_plains(transform: Any, in_step: bool, planned: tuple[nn.Module, tightfit.Applied]) -> None:
    model, applied = planned
    plain = transform(model_of())
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromiseWarning)
        with applied.step(BATCH) if in_step else nullcontext():
            found = transform(model)
    assert len(found) == len(plain) > 0
    assert all(map(torch.equal, found, plain))
    # The plan is there as before, and nothing was planned again.
    applied.statistics.reset()
    applied.loss(model, BATCH).backward()
    assert applied.statistics.replayed_ops > 0
    assert applied.statistics.mismatches == 0
    assert torch.autograd.graph.disable_saved_tensors_hooks.__module__ == "torch.autograd.graph"


@pytest.mark.parametrize("in_step", [False, True])
def test_that_the_budget_may_be_lost_is_told_once(in_step: bool) -> None:
    model = model_of()
    with tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full") as applied:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                with applied.step(BATCH) if in_step else nullcontext():
                    gradients = gradient(model)
                for parameter, found in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = found
                optimizer.step()
        told = [str(one.message) for one in caught if one.category is PromiseWarning]
        assert len(told) == 1
        assert "torch.func" in told[0]
