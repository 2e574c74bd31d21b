"""Modules that only the loss reaches come out of planning as they went in: discriminators, teachers, queues."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tightfit
from tightfit.step.reached import reached_by

Loss = Callable[[nn.Module, Tensor], Tensor]

BATCH = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def generator_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))


def discriminator() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64)), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 1)
    )
    layers.register_buffer("calls", torch.zeros(()))
    layers.register_forward_hook(lambda module, *_: module.calls.add_(1) and None)
    return layers


def hinge(other: nn.Module, made: Tensor) -> Tensor:
    return F.softplus(-other(made)).mean()


def by_closure(other: nn.Module) -> Loss:
    return lambda model, x: hinge(other, model(x))


def by_closure_of_a_closure(other: nn.Module) -> Loss:
    def judge(made: Tensor) -> Tensor:
        return hinge(other, made)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return judge(model(x))

    return loss


def by_default(other: nn.Module) -> Loss:
    def loss(model: nn.Module, x: Tensor, *, judge: nn.Module = other) -> Tensor:
        return hinge(judge, model(x))

    return loss


def by_partial(other: nn.Module) -> Loss:
    def loss(judge: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
        return hinge(judge, model(x))

    return functools.partial(loss, other)


class Losses:
    def __init__(self, other: nn.Module) -> None:
        self.networks = {"judges": [other]}

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        return hinge(self.networks["judges"][0], model(x))

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.loss(model, x)


def by_bound_self(other: nn.Module) -> Loss:
    return Losses(other).loss


def by_callable_object(other: nn.Module) -> Loss:
    return Losses(other)


GLOBAL: list[nn.Module] = []


def _of_global(model: nn.Module, x: Tensor) -> Tensor:
    return hinge(GLOBAL[0], model(x))


def by_global(other: nn.Module) -> Loss:
    GLOBAL[:] = [other]
    return _of_global


WAYS = [
    by_closure, by_closure_of_a_closure, by_default, by_partial, by_bound_self, by_callable_object, by_global
]  # fmt: skip


def state_of(other: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {name: value.clone() for name, value in other.state_dict().items()}
    for name, parameter in other.named_parameters():
        state[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = (
            torch.equal(value, after[name]) if value is not None and after[name] is not None else value is after[name]
        )
        assert same, name


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_planning_leaves_what_the_loss_reaches_as_it_was(way: Callable[[nn.Module], Loss], has_gradients: bool) -> None:
    model, other = generator_network(), discriminator()
    loss = way(other)
    assert other in reached_by(loss, model)
    optimizer = torch.optim.Adam(model.parameters())
    loss(model, BATCH).backward()
    if not has_gradients:
        other.zero_grad()
    before = state_of(other)
    tightfit.measure(model, BATCH, loss=loss, optimizer=optimizer)
    assert_same(before, state_of(other))
    applied = tightfit.fit(model, BATCH, loss=loss, optimizer=optimizer, grad_checkpoint="full")
    assert_same(before, state_of(other))
    applied.loss(model, BATCH).backward()  # the user's own step changes it
    assert float(other.calls) == float(before["calls"]) + 1


def test_a_plan_made_in_mid_training_runs_nothing_of_it_twice() -> None:
    model, other = generator_network(), discriminator()
    loss = by_closure(other)
    with tightfit.fit(model, BATCH, loss=loss, grad_checkpoint="full") as applied:
        for rows in (64, 50, 40):
            calls, moved = float(other.calls), int(other[1].num_batches_tracked)
            applied.loss(model, BATCH[:rows]).backward()
            assert float(other.calls) == calls + 1
            assert int(other[1].num_batches_tracked) == moved + 1


def test_the_model_itself_and_what_is_too_far_away_are_not_reached() -> None:
    model = generator_network()
    data = [torch.zeros(1)] * 1000

    def loss(one: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum() + len(data)

    assert reached_by(loss, model) == (data[0],)  # one tensor, many times
    assert reached_by(None, model) == ()
    assert reached_by(F.cross_entropy, model) == ()
