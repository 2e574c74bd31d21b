"""A step that failed before its optimizer ran leaves nothing behind."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from tightfit.train.step_undo import StepUndo


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("mask", torch.ones(3))
        self.calls = 0
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(random.random())
        self.latest = "set in forward"
        self.seen += torch.rand(2)
        return self.norm(self.linear(x)) * torch.rand(())


def state_of(model: Counts) -> list[object]:
    buffers = [buffer.tolist() for buffer in model.buffers()]
    drawn = random.getstate(), torch.get_rng_state().tolist()
    return [*buffers, *drawn, model.calls, list(model.history), hasattr(model, "latest")]


def test_buffers_generators_and_attributes_are_put_back() -> None:
    model = Counts()
    undo = StepUndo(model)
    for _ in range(2):
        model(torch.randn(5, 4)).sum().backward()
        undo.note()
        before = state_of(model)
        weights = [parameter.tolist() for parameter in model.parameters()]
        expected = model(torch.ones(5, 4)).tolist()
        assert state_of(model) != before
        undo.undo()
        assert state_of(model) == before
        assert [parameter.tolist() for parameter in model.parameters()] == weights
        assert model(torch.ones(5, 4)).tolist() == expected
        undo.undo()


def test_what_does_not_change_is_copied_once() -> None:
    model = Counts()
    undo = StepUndo(model)
    kept = undo._copies[id(model.mask)]
    model(torch.randn(5, 4))
    undo.note()
    assert undo._copies[id(model.mask)] is kept
    assert undo._copies[id(model.seen)] is not kept
