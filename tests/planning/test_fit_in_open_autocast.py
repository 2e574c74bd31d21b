"""`fit` inside a context of autocast that is open: later steps open one each, and cast the weights anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tightfit
from tightfit.device.memory import measure_peak, resident_bytes


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    with autocast():  # as loops do that compute the loss in a function of theirs
        return model(batch).float().square().mean()


def test_steps_follow_the_plan_that_was_made_there() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4)])
    batch = torch.randn(256, 32)
    plain = tightfit.solve(tightfit.measure(model, batch, loss=loss_of), 2**40)
    budget = plain.baseline_bytes + (plain.predicted_peak_bytes - plain.baseline_bytes) // 2
    with autocast():
        applied = tightfit.fit(model, batch, budget=budget, loss=loss_of, reference_budget_bytes=2**30)
    assert applied.verdict is not None
    assert applied.verdict.ok

    def step() -> None:
        with autocast():
            loss = applied.loss(model, batch)
        loss.backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    applied.statistics.reset()
    assert measure_peak(step, resident_bytes(model, batch))[1] <= budget
    assert (applied.statistics.mismatches, applied.statistics.unplanned_calls) == (0, 0)
    assert applied.statistics.replayed_ops > 0
    planned = [parameter.grad for parameter in model.parameters()]
    applied.remove()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with autocast():
        loss = loss_of(model, batch)
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(planned, model.parameters(), strict=True))
