"""Models that others wrap after `fit`: the plan is found, followed, made anew and taken off wherever it lies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tests.support.chains import ResidualMLP
from tightfit.errors import PromiseWarning, UnsupportedInput

BATCH = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
STEPS = 5


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return ResidualMLP(3)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).float() * 2.0  # type: ignore[no-any-return]  # calls of modules are not annotated


class Adapted(nn.Module):
    """As PEFT: layers get adapters in their place, weights are frozen, and the model is called through others."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        model.requires_grad_(False)
        for block in model.blocks:  # type: ignore[union-attr]  # as `ResidualMLP` has them
            block.up = Adapter(block.up)
        self.base_model = model
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            found: Tensor = self.base_model.forward(x)  # past the hooks, as PEFT does
            return found


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base_layer(x) + self.up(self.down(x))
        return found


class Demanding(Adapted):
    """As Lightning Fabric: backward has to be called through it, so that no plan can try it."""

    calls_backward = False

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)

        def refuse(_: Tensor) -> None:
            if not self.calls_backward:
                raise RuntimeError("call my backward()")

        if found.requires_grad:
            found.register_hook(refuse)
        return found


def train(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """All gradients of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        result = loss(model, BATCH)
        for part in model.modules():
            if isinstance(part, Demanding):
                part.calls_backward = True
        result.backward()  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
        for part in model.modules():
            if isinstance(part, Demanding):
                part.calls_backward = False
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
    return found


def fitted(model: nn.Module) -> tightfit.Applied:
    return tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full")


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


def accelerated(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    prepared: nn.Module = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    return prepared


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "accelerate": accelerated,
    "adapters": lambda model: Adapted(model, autocast=False),
    "adapters, and autocast around": lambda model: Adapted(model, autocast=True),
    "adapters, and accelerate around": lambda model: accelerated(Adapted(model, autocast=False)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
def test_training_through_it_is_planned_after_one_step_at_most(wrap: Any) -> None:
    expected = train(wrap(model_of()), loss_of)
    model = model_of()
    applied = fitted(model)
    wrapped = wrap(model)
    assert_equal(train(wrapped, applied.loss), expected)
    assert applied.plans is not None
    assert applied.plans.statistics.mismatched_steps <= 1
    assert applied.plans.statistics.tried <= 2
    assert applied.statistics.replayed_ops > 0
    applied.remove()
    applied.statistics.reset()
    loss_of(wrapped, BATCH).backward()  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
    assert applied.statistics.taped_ops == 0


def test_what_planning_cannot_call_is_told_once_and_not_tried_again() -> None:
    expected = train(Demanding(model_of(), autocast=True), loss_of)
    model = model_of()
    applied = fitted(model)
    wrapped = Demanding(model, autocast=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_equal(train(wrapped, applied.loss), expected)
    told = [str(one.message) for one in caught if one.category is PromiseWarning]
    assert len(told) == 1
    assert "called through Demanding, ResidualMLP runs other operations" in told[0]
    assert applied.plans is not None
    assert applied.plans.statistics.tried == 2


def test_a_model_that_is_unwrapped_after_fit_is_told_once_and_not_planned_again() -> None:
    model = model_of()
    wrapped = Adapted(model, autocast=False)
    applied = fitted(wrapped)
    with pytest.warns(PromiseWarning, match="a step ran planned modules of Adapted, but not Adapted itself"):
        train(model, applied.loss)
    assert applied.plans is not None
    assert applied.plans.statistics.replanned == 0


def test_a_loss_that_calls_a_method_of_the_model_is_planned_again() -> None:
    """There the model itself is never called, and nobody has gone round it."""

    class Net(ResidualMLP):
        exponential = False

        def compute(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x).exp() if self.exponential else block(x)
            return self.head(x).pow(2).mean()  # type: ignore[no-any-return]  # calls of modules are not annotated

    model = Net(3)
    with tightfit.fit(model, BATCH, loss=lambda m, x: m.compute(x), grad_checkpoint="full") as applied:
        model.exponential = True
        for _ in range(3):
            applied.loss(model, BATCH).backward()  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
        assert applied.plans is not None
        assert (applied.plans.statistics.mismatched_steps, applied.plans.statistics.replanned) == (1, 1)


def test_a_plan_is_found_beneath_a_wrapper_and_can_be_replaced_there() -> None:
    class Alone(nn.Module):
        """Has no module inside that could show its plan."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).sin().exp().sum()

    model: nn.Module = Alone()
    plain = copy.deepcopy(model)
    applied = fitted(model)
    for _ in range(3):
        wrapped = accelerated(model)
        with pytest.raises(UnsupportedInput, match="a plan installed already"):
            fitted(wrapped)
        applied.remove()
        applied = fitted(wrapped)
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.Accelerator(cpu=True).unwrap_model(wrapped, keep_fp32_wrapper=False)
        vars(model).pop("_is_accelerate_prepared", None)
    applied.remove()
    assert_equal(train(copy.deepcopy(model), loss_of), train(plain, loss_of))
