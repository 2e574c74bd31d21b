"""The proof can fail: a corrupted engine is found out, and what was not compared is not called equal."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit import Plan, UnsupportedInput, Verdict
from tightfit.replay.tape import Tape
from tightfit.solver.solver import full_plan
from tightfit.step.results import results_of
from tightfit.verification.marks import keeper

Tensor = torch.Tensor


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.dropout(nn.functional.gelu(self.up(self.norm(x))), 0.1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).log_softmax(-1).pow(2).mean()


BATCH = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Drops everything; plain does not fit its budget."""
    model = Net()
    profile = tightfit.measure(model, BATCH, loss=loss_of)
    full = full_plan(profile, 2**40)
    return full_plan(profile, (full.predicted_peak_bytes + full.plain_peak_bytes) // 2)


def verify(plan: Plan, **options: Any) -> Verdict:
    return tightfit.verify(Net(), BATCH, plan, loss=loss_of, **options)


def test_whole_step(plan: Plan) -> None:
    verdict = verify(plan, reference_budget_bytes=2**30, steps=2)
    assert verdict.ok is True
    assert verdict.method == "whole-step"
    assert (verdict.loss_equal, verdict.gradients_equal, verdict.buffers_equal, verdict.rng_equal) == (True,) * 4
    assert (verdict.max_abs_difference, verdict.differing, verdict.unverified) == (0.0, (), ())
    assert (verdict.plain_reproducible, verdict.not_reproducible) == (True, ())
    assert (verdict.plain_peak_source, verdict.plain_step_source) == ("measured", "measured")
    assert verdict.measured_peak_bytes <= verdict.budget_bytes == plan.budget_bytes < verdict.plain_peak_bytes
    assert verdict.predicted_peak_bytes == plan.predicted_peak_bytes
    assert verdict.step_ms > 0
    assert verdict.plain_step_ms > 0
    assert verdict.overhead_ratio == pytest.approx(verdict.step_ms / verdict.plain_step_ms - 1)
    assert verdict.replayed_ops > 0
    assert (verdict.mismatches, verdict.steps) == (0, 2)


def test_per_region_when_plain_does_not_fit(plan: Plan) -> None:
    verdict = verify(plan)
    assert verdict.method == "per-region"
    assert verdict.gradients_equal is True
    assert (verdict.plain_peak_source, verdict.plain_step_source) == ("predicted", "predicted")
    assert verdict.loss_equal is None
    assert verdict.compared_share == 1.0
    assert verdict.unverified == ()
    assert verdict.ok is True


def test_a_region_is_called_alone_under_the_autocast_that_the_loss_function_opens() -> None:
    """Without it a half-precision input meets weights that are not, and nothing could be compared."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().pow(2).mean()

    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)))
    profile = tightfit.measure(model, BATCH, loss=loss)
    smallest = tightfit.frontier(profile, points=2)[0]
    verdict = tightfit.verify(model, BATCH, smallest, loss=loss)
    assert (verdict.method, verdict.ok, verdict.compared_share) == ("per-region", True, 1.0)


def test_the_loss_is_compared_where_plain_does_not_fit(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(region.key.startswith("<loss>") and region.recipe >= 0 for region in plan.regions)
    perturb(monkeypatch, only_shape=(256, 16))
    verdict = verify(plan)
    assert verdict.method == "per-region"
    assert "<loss>#0: gradient of input 0" in verdict.differing


def perturb(monkeypatch: pytest.MonkeyPatch, only_shape: tuple[int, ...] | None = None) -> None:
    """Every replayed tensor comes out a little wrong."""
    right = Tape.read

    def wrong(self: Tape, handle: Any) -> Tensor:
        tensor = right(self, handle)
        is_meant = tensor.is_floating_point() and only_shape in (None, tensor.shape)
        return tensor * (1 + 2**-20) if is_meant else tensor

    monkeypatch.setattr(Tape, "read", wrong)


def test_a_corrupted_engine_fails_the_whole_step(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    perturb(monkeypatch)
    verdict = verify(plan, reference_budget_bytes=2**30)
    assert verdict.ok is False
    assert verdict.gradients_equal is False
    assert verdict.max_abs_difference is not None
    assert verdict.max_abs_difference > 0
    assert any("up.weight" in name for name in verdict.differing)
    assert verdict.loss_equal is True  # forward is not touched
    assert verdict.buffers_equal is True


def test_a_corrupted_engine_fails_per_region(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    perturb(monkeypatch)
    verdict = verify(plan)
    assert verdict.method == "per-region"
    assert verdict.ok is False
    assert verdict.gradients_equal is False
    assert any("gradient" in name for name in verdict.differing)


def test_buffers_touched_twice_are_found(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tape.read
    model = Net()

    def wrong(self: Tape, handle: Any) -> Tensor:
        model.layers[0].norm.running_mean.data.add_(1)  # unseen by version counters, as a second update would be
        return right(self, handle)

    monkeypatch.setattr(Tape, "read", wrong)
    verdict = tightfit.verify(model, BATCH, plan, loss=loss_of, reference_budget_bytes=2**30)
    assert verdict.ok is False
    assert verdict.buffers_equal is False


def test_a_consumed_generator_is_found(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tape.read

    def wrong(self: Tape, handle: Any) -> Tensor:
        torch.rand(1)
        return right(self, handle)

    monkeypatch.setattr(Tape, "read", wrong)
    verdict = verify(plan, reference_budget_bytes=2**30)
    assert verdict.ok is False
    assert verdict.rng_equal is False


def test_a_peak_above_the_budget_is_not_ok(plan: Plan) -> None:
    verdict = verify(dataclasses.replace(plan, budget_bytes=plan.baseline_bytes), reference_budget_bytes=2**30)
    assert verdict.gradients_equal is True
    assert verdict.measured_peak_bytes > verdict.budget_bytes
    assert verdict.ok is False


def test_a_plain_step_that_differs_from_itself_is_not_blamed_on_the_plan(plan: Plan) -> None:
    counter = 0

    def unsteady(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal counter
        counter += 1
        return loss_of(model, batch) * (1 + counter / 100)

    verdict = tightfit.verify(Net(), BATCH, plan, loss=unsteady, reference_budget_bytes=2**30)
    assert verdict.plain_reproducible is False
    assert "loss of step 1" in verdict.not_reproducible
    assert verdict.differing == ()


def test_no_steps_compare_nothing(plan: Plan) -> None:
    with pytest.raises(UnsupportedInput, match="steps=0"):
        verify(plan, steps=0)


def test_the_model_is_as_before_and_unplanned(plan: Plan) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tightfit.verify(model, BATCH, plan, loss=loss_of, optimizer=optimizer, reference_budget_bytes=2**30, steps=2)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "dropout": 0.2}, {"bidirectional": True}], ids=str)
def test_onednn_lstm_is_replayed_with_equal_gradients(options: dict[str, Any]) -> None:
    """Self-checks cannot judge this kernel (its workspace has undefined padding): compare its gradients."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(24, 40, batch_first=True, **options)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(torch.tanh(x))[0].pow(2).mean()

    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(16, 33, 24)
    profile = tightfit.measure(model, x)
    plan = full_plan(profile, 2**40)
    replayed = {recipe.op_names[position] for recipe in plan.recipes for position in recipe.replay}
    assert "aten.mkldnn_rnn_layer.default" in replayed
    verdict = tightfit.verify(model, x, plan, steps=3)
    assert verdict.ok, verdict
    assert verdict.mismatches == 0


def test_what_modules_keep_in_attributes_is_looked_at() -> None:
    model = Net()
    layer = model.layers[1]
    layer.calls, layer.cache, layer.address = 3, {"keys": [torch.ones(2), "text"]}, layer.up.weight.data_ptr() | 2**46
    layer.weights = [layer.up.weight]  # compared as a parameter
    found = results_of(model, keeper())
    names = {name.removeprefix("attribute layers.1.") for name in found if name.startswith("attribute layers.1.")}
    kept = {"calls", "cache (length)", "cache['keys'] (length)", "cache['keys'][0]", "cache['keys'][1]"}
    assert kept <= names
    assert not {name for name in names if name.startswith(("address", "weights[", "_"))}
