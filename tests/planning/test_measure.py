"""`measure`: of opaque calls it finds out what `fit` would, so that what it names is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit import BudgetInfeasible
from tightfit.device.described.cards import card_for
from tightfit.planning import search
from tightfit.planning.elsewhere import fit_elsewhere
from tightfit.report.elsewhere import format_fitting
from tightfit.step.step import Step

WIDTH = 32
BATCH = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(1))


class DrawsUnseen(torch.autograd.Function):
    """Draws random numbers, which no operator tells while there are no data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.empty_like(x)
        mask.numpy()[...] = torch.rand(x.shape).numpy() > 0.1
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask


class Net(nn.Module):
    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.kernel = type(kernel.__name__, (kernel,), {})  # of whose calls nothing is known yet
        self.wide = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(self.kernel.apply(wide(x)).sin())
        return x.pow(2).mean()


def test_a_measured_step_leaves_the_model_as_it_was_and_names_a_budget_that_fit_accepts() -> None:
    """`tests/planning/test_opaque_models.py` has operators of which only a run shows that they must not run again."""
    model = Net(DrawsUnseen)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    profile = tightfit.measure(model, BATCH)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert profile.unproven == ()
    tightfit.fit(model, BATCH, budget=tightfit.frontier(profile, points=2)[0].budget_bytes).remove()


def test_what_could_not_be_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_has_room", lambda *_: False)
    profile = tightfit.measure(Net(DrawsUnseen), BATCH)
    assert [name.rpartition(".")[2] for name in profile.unproven] == ["DrawsUnseen"]
    with pytest.raises(BudgetInfeasible, match=r"No step has shown yet that .*DrawsUnseen can be run again") as caught:
        tightfit.solve(profile, 1)
    assert caught.value.unproven == profile.unproven


def test_for_a_gpu_that_is_not_here_they_are_named_too() -> None:
    halved = torch.library.custom_op(
        "tightfit_tests::halved", lambda x: x / 2, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    halved.register_fake(torch.empty_like)
    halved.register_autograd(lambda ctx, grad: grad / 2)

    class Halving(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = halved(super().forward(x)).sin().sum()
            return result

    card, model = card_for("cuda:1GiB"), Halving(WIDTH, WIDTH)
    found = fit_elsewhere(model, BATCH, Step(), card, 2**30)
    assert found.profile.unproven == ("tightfit_tests.halved.default",)
    assert tightfit.measure(model, BATCH, device="cuda:1GiB").unproven == found.profile.unproven
    assert "no step has shown that tightfit_tests.halved.default can be run again" in format_fitting(found)


def test_of_pytorch_s_own_operations_no_plan_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        raise AssertionError("a plan was run")

    monkeypatch.setattr("tightfit.planning.measure.confirm_smallest", nothing)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.BatchNorm1d(WIDTH))
    assert tightfit.measure(model, BATCH, loss=lambda m, x: m(x).pow(2).mean()).unproven == ()
