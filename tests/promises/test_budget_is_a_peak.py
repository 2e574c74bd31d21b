"""Keep a budget as a peak, never as a ratio: measured, on a CNN, a U-Net, a transformer and an RNN.

See https://github.com/pytorch/pytorch/issues/197838 and https://github.com/pytorch/pytorch/issues/58466.

That the command line prints the smallest budget, and runs with it, is shown in tests/cli/test_bad_input.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tests.promises.training import Snapshot, adamw, differences, train
from tightfit import BudgetInfeasible
from tightfit.device import memory as meter
from tightfit.solver.solver import Solver


def random_batch(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 16, 16]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2))
                for a, b in pairwise(widths)
            )
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3))).logsumexp(-1).mean()


class UNet(nn.Module):
    """Skips from the way down to the way up: the first values made are the last ones needed."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.block(3, 8), self.block(8, 16)])
        self.up = nn.ModuleList([self.block(24, 8)])
        self.last = nn.Conv2d(8, 1, 1)

    @staticmethod
    def block(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = skips.pop()
        for block in self.up:
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.last(x).pow(2).mean()


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).pow(2).mean()


class Rnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(16, 32)
        self.head = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[1], 32)
        states = []
        for step in x:
            state = self.cell(step, state)
            states.append(state)
        return self.head(torch.stack(states)).pow(2).mean()


MODELS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (Cnn, random_batch(16, 3, 32, 32)),
    (UNet, random_batch(4, 3, 32, 32)),
    (Transformer, random_batch(8, 32, 32)),
    (Rnn, random_batch(8, 32, 16)),
]
KINDS = pytest.mark.parametrize(("kind", "batch"), MODELS, ids=[kind.__name__ for kind, _ in MODELS])

#: Where between the smallest budget (0) and the plain peak (1).
PARTS = (0.2, 0.5, 0.8)


def build(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch)
    return loss


@KINDS
@pytest.mark.slow
def test_the_measured_peak_is_within_every_budget(kind: Callable[[], nn.Module], batch: Tensor) -> None:
    """One measurement serves all budgets; that `fit`, which also repairs, is held to them is test_planner's."""
    model = build(kind)
    solver = Solver(tightfit.measure(model, batch, optimizer=adamw(model)))
    smallest = solver.minimum_budget()[0]
    plain = run_two_steps(model, batch)
    for budget in (smallest, *(smallest + int(part * (plain.peak_bytes - smallest)) for part in PARTS)):
        model = build(kind)
        with tightfit.apply(model, solver.solve(budget)) as applied:
            planned = run_two_steps(model, batch, applied.loss)
        assert differences(plain.steps, planned.steps) == []
        assert planned.peak_bytes <= budget < plain.peak_bytes
        assert applied.plan.predicted_peak_bytes <= budget
    predicted_time_never_increases(solver)


def test_no_budget_is_too_small_to_learn_the_smallest_that_runs() -> None:
    batch = random_batch(8, 3, 16, 16)
    model = build(Cnn)
    with pytest.raises(BudgetInfeasible, match=r"Give at least \d+ bytes") as caught:
        tightfit.fit(model, batch, optimizer=adamw(model), budget=1)
    assert caught.value.where
    with tightfit.fit(model, batch, optimizer=adamw(model), budget=caught.value.required_bytes) as applied:
        assert applied.verdict is not None
        assert applied.verdict.measured_peak_bytes <= caught.value.required_bytes
        assert run_two_steps(model, batch, applied.loss).peak_bytes <= caught.value.required_bytes


@dataclass(frozen=True)
class TwoSteps:
    steps: list[Snapshot]
    peak_bytes: int
    """Of a third step, by the profiler's memory events."""


def run_two_steps(model: nn.Module, batch: Tensor, loss: Callable[[nn.Module, Any], Tensor] = loss_of) -> TwoSteps:
    optimizer = adamw(model)
    steps = train(model, [batch] * 2, loss, optimizer)

    def third() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss(model, batch).backward()
        optimizer.step()

    return TwoSteps(steps, meter.measure_peak(third, meter.resident_bytes(model, batch, optimizer))[1])


def predicted_time_never_increases(solver: Solver) -> None:
    smallest, plain = solver.minimum_budget()[0], solver.plain(0).predicted_peak_bytes
    plans = [solver.solve(smallest + (plain - smallest) * k // 12) for k in range(13)]
    for tight, loose in pairwise(plans):
        assert loose.predicted_step_ms <= tight.predicted_step_ms
    for plan in plans:
        assert plan.predicted_peak_bytes <= plan.budget_bytes
        assert plan.lower_bound_ms <= plan.predicted_step_ms
    assert plans[0].predicted_step_ms > plans[-1].predicted_step_ms == plans[-1].plain_step_ms
    assert plans[-1].is_plain
