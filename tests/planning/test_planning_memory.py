"""Planning itself stays within the budget, by a meter that shares nothing with the prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.support.planning_meter import PlanningMeter
from tightfit import UnsupportedInput
from tightfit.device import memory as meter
from tightfit.profiling import partial_call
from tightfit.profiling.signatures import SignatureTable

Tensor = torch.Tensor
MIB = 2**20


class Wide(nn.Module):
    """Many parameters, few activations: parameters, gradients and optimizer state fill the budget."""

    def __init__(self, layers: int = 6, width: int = 512) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Deep(nn.Module):
    """Few parameters, many activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.Dropout(0.1))
            for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Convolutional(nn.Module):
    """Kernels with scratch of their own, and a data-dependent step, which is measured for real."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * (1.0 if float(x.detach().sum()) > 0 else 2.0)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


CASES: dict[str, tuple[Any, Tensor]] = {
    "wide": (Wide, torch.randn(8, 512)),
    "deep": (Deep, torch.randn(4096, 64)),
    "convolutional": (Convolutional, torch.randn(8, 8, 48, 48)),
}


def trained(model: nn.Module, batch: Tensor, resident: bool) -> torch.optim.Optimizer:
    """An optimizer, with state and gradients in place if asked for."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    if resident:
        loss_of(model, batch[:1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return optimizer


@pytest.mark.parametrize("resident", [False, True], ids=["before the first step", "in training"])
@pytest.mark.parametrize("case", CASES)
def test_fit_takes_no_more_than_the_budget(case: str, resident: bool) -> None:
    build, batch = CASES[case]
    model = build()
    optimizer = trained(model, batch, resident)
    profile = tightfit.measure(model, batch, loss=loss_of, optimizer=optimizer)
    with pytest.raises(tightfit.BudgetInfeasible) as caught:
        tightfit.solve(profile, 1)
    smallest = caught.value.required_bytes
    plain = tightfit.solve(profile, 2**40).plain_peak_bytes
    budget = smallest + (plain - smallest) // 3 + 4096  # scaled figures are a few bytes off
    before = meter.resident_bytes(model, batch, optimizer)
    with PlanningMeter() as metered:
        applied = tightfit.fit(model, batch, budget=budget, loss=loss_of, optimizer=optimizer)
    assert applied.verdict is not None
    assert applied.verdict.ok is not False
    assert applied.plan.predicted_peak_bytes <= budget
    assert before + metered.peak <= budget
    assert metered.level <= 1024  # nothing is left behind
    applied.remove()


def test_what_does_not_fit_beside_the_model_is_estimated_and_says_so() -> None:
    """In training, a foreach operation's made-up arguments would be a second optimizer state."""
    model = Wide()
    batch = torch.randn(8, 512)
    optimizer = trained(model, batch, resident=True)
    free = tightfit.measure(model, batch, loss=loss_of, optimizer=optimizer)
    assert not any(signature.note for signature in free.signatures)
    with tightfit.fit(model, batch, budget=free.baseline_bytes * 4 // 3, loss=loss_of, optimizer=optimizer) as applied:
        assert applied.profile is not None
        notes = {s.name: s for s in applied.profile.signatures if s.note}
    assert any("foreach" in name for name in notes)
    assert all("measured on" in s.note and s.ms > 0 for s in notes.values() if "foreach" in s.name)
    plain = {s.name: s.ms for s in free.signatures}
    for name, signature in notes.items():
        assert signature.ms < 100 * plain[name] + 1  # of the right order: scaled, not summed up anew


def test_a_call_is_shrunk_to_the_memory_there_is() -> None:
    table = SignatureTable()
    tensors = [torch.zeros(256) for _ in range(10)]  # 1 KiB each
    number = table.add(torch.ops.aten._foreach_add.List, (tensors, tensors), {})
    table.record_result(number, tensors, [torch.zeros(256) for _ in range(10)])
    call, results = table.calls[number], table.result_bytes[number]
    assert (partial_call.argument_bytes(call), results) == (20 * 1024, 10 * 1024)
    assert partial_call.fit_call(call, results, None).call is call
    assert partial_call.fit_call(call, results, 32 * 1024).call is call
    part = partial_call.fit_call(call, results, 30 * 1024)
    assert part.call is not None
    assert [len(argument) for argument in part.call.args] == [9, 9]
    assert "9 of 10" in part.note
    assert part.scale == pytest.approx(10 / 9)
    assert partial_call.fit_call(call, results, 3 * 1024).call is None
    number = table.add(torch.ops.aten._foreach_addcdiv_.ScalarList, (tensors, tensors, tensors, [1.0] * 10), {})
    part = partial_call.fit_call(table.calls[number], 0, 20 * 1024)
    assert part.call is not None
    assert [len(argument) for argument in part.call.args] == [6, 6, 6, 6]
    single = table.calls[table.add(torch.ops.aten.add.Tensor, (tensors[0], tensors[1]), {})]
    assert partial_call.fit_call(single, 1024, 3 * 1024 - 1).note.startswith("estimated")


def test_a_running_profiler_is_not_ended() -> None:
    model, batch = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with pytest.raises(UnsupportedInput, match=r"torch\.profiler is recording"):
            tightfit.fit(model, batch, loss=loss_of, budget="1GiB")
        model(batch)
    assert any(event.key == "aten::linear" for event in profile.key_averages())
