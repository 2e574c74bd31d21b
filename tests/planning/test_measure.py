"""`measure`: of opaque calls it finds out what `fit` would, so that both name the same smallest budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit import BudgetInfeasible
from tightfit.planning import search

WIDTH = 32
BATCH = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(1))


class ChangesState(torch.autograd.Function):
    """A kernel that also counts, in a tensor that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor) -> Tensor:
        state.numpy()[...] += 1
        out = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return gradients[0] * (1 - out**2), None


class DrawsUnseen(torch.autograd.Function):
    """Draws random numbers, which no operator tells while there are no data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor) -> Tensor:
        mask = torch.empty_like(x)
        mask.numpy()[...] = torch.rand(x.shape).numpy() > 0.1
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, None


class Net(nn.Module):
    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.kernel = type(kernel.__name__, (kernel,), {})  # of whose calls nothing is known yet
        self.wide = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(self.kernel.apply(wide(x), self.state).sin())
        return x.pow(2).mean()


def named_by_fit(model: nn.Module) -> int:
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.fit(model, BATCH, budget=1)
    assert not caught.value.unproven
    return caught.value.required_bytes


@pytest.mark.parametrize("kernel", [ChangesState, pytest.param(DrawsUnseen, marks=pytest.mark.exhaustive)])
def test_the_smallest_budget_of_a_measured_step_is_that_of_fit(kernel: Any) -> None:
    model = Net(kernel)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile = tightfit.measure(model, BATCH)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert profile.unproven == ()
    assert tightfit.frontier(profile, points=2)[0].budget_bytes == named_by_fit(model)


def test_what_could_not_be_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_has_room", lambda *_: False)
    profile = tightfit.measure(Net(DrawsUnseen), BATCH)
    assert [name.rpartition(".")[2] for name in profile.unproven] == ["DrawsUnseen"]
    with pytest.raises(BudgetInfeasible, match=r"No step has shown yet that .*DrawsUnseen can be run again") as caught:
        tightfit.solve(profile, 1)
    assert caught.value.unproven == profile.unproven


def test_of_pytorch_s_own_operations_no_plan_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        raise AssertionError("a plan was run")

    monkeypatch.setattr("tightfit.planning.measure.confirm_smallest", nothing)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.BatchNorm1d(WIDTH))
    assert tightfit.measure(model, BATCH, loss=lambda m, x: m(x).pow(2).mean()).unproven == ()
