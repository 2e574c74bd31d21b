"""What planning takes of the host's memory where the model is on a GPU: eight processes share one host."""

from __future__ import annotations

import torch
from torch import nn

import tightfit
from tightfit.device.host_meter import measure_host_peak
from tightfit.solver.solver import Solver
from tightfit.step.step import Step

WIDTH, LAYERS = 1024, 3


def model_and_step() -> tuple[nn.Module, Step, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)]
    model = nn.Sequential(*layers).to("cuda")
    step = Step(loss=lambda m, b: m(b).pow(2).mean(), optimizer=torch.optim.AdamW(model.parameters()))
    return model, step, torch.randn(16384, WIDTH, device="cuda")


def bytes_for_each_parameter(model: nn.Module, step: Step, batch: torch.Tensor) -> float:
    """Fit at half of what can be saved, and return the host bytes that this took, the batch's own copy left out."""
    profile = tightfit.measure(model, batch, step=step)
    solver = Solver(profile)
    budget = (solver.smallest().peak_bytes + solver.plain(0).predicted_peak_bytes) // 2
    applied, peak = measure_host_peak(
        lambda: tightfit.fit(
            model, batch, budget=budget, step=step, profile=profile, reference_budget_bytes=80 * 2**30
        ),
        0,
    )
    assert applied.verdict is not None
    assert applied.verdict.method == "whole-step"
    assert applied.verdict.replayed_ops
    applied.remove()
    return (peak - batch.nbytes) / sum(p.numel() for p in model.parameters())


def test_of_parameters_and_optimizer_state_there_is_one_copy() -> None:
    model, step, batch = model_and_step()
    assert bytes_for_each_parameter(model, step, batch) <= 12.5


def test_in_the_midst_of_a_training_too() -> None:
    model, step, batch = model_and_step()
    step.run(model, batch)
    for parameter in model.parameters():
        parameter.grad = None
    assert bytes_for_each_parameter(model, step, batch) <= 12.5


def test_gradients_that_are_there_are_copied_once() -> None:
    model, step, batch = model_and_step()
    step.run(model, batch)
    assert bytes_for_each_parameter(model, step, batch) <= 16.5
