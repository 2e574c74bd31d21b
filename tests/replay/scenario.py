"""A small network with a plan that drops all it may: a scenario, run plain and planned, must leave equal bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import tightfit
from tests.replay.helpers import differences
from tightfit import Plan
from tightfit.replay.statistics import Statistics
from tightfit.solver.solver import full_plan

Tensor = torch.Tensor
#: What a scenario leaves behind, by name.
Left = dict[str, Tensor | None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).log_softmax(-1).pow(2).sum()


BATCH = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@cache
def plan() -> Plan:
    return full_plan(tightfit.measure(Net(), BATCH, loss=loss_of), 2**30)


class Stage:
    """What a scenario gets: the model, and the plan in force on it, if any."""

    def __init__(self, model: Net, applied: tightfit.Applied | None) -> None:
        self.model = model
        self.applied = applied

    def step(self) -> AbstractContextManager[None]:
        return self.applied.step() if self.applied is not None else nullcontext()

    def loss(self, batch: Tensor = BATCH) -> Tensor:
        with self.step():
            return loss_of(self.model, batch)

    def taped(self) -> int:
        return self.applied.statistics.taped_ops if self.applied is not None else 0


def assert_equal(scenario: Callable[[Stage], Left]) -> Statistics:
    """The scenario leaves the same bits with and without a plan; returns what the engine did."""
    stage, model = Stage(Net(), None), Net()
    torch.manual_seed(1)
    plain = scenario(stage)
    with tightfit.apply(model, plan()) as applied:
        torch.manual_seed(1)
        planned = scenario(Stage(model, applied))
    found = differences(plain, planned)
    assert not found, found
    return applied.statistics


def copied(tensors: dict[str, Any], prefix: str) -> Left:
    return {f"{prefix} {name}": t.detach().clone() if isinstance(t, Tensor) else t for name, t in tensors.items()}
