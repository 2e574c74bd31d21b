"""One `fit` is one trial: its whole steps and snapshots are counted, and the state is put back.

Of the whole steps, one is run for the self-checks of a plan, one under the meter; plain runs twice under the meter; and
one of each is timed, by `verify` three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.planning import search
from tightfit.solver.solver import Solver
from tightfit.step.snapshot import RandomState, TrainingState

Tensor = torch.Tensor
WIDTH = 32
BATCH = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0))


@dataclass
class Counts:
    steps: int = 0
    """Forwards with data: these models run one a step."""
    snapshots: int = 0


COUNTS = Counts()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            COUNTS.steps += 1
        for layer in self.layers:
            x = x + layer(x)
        return x.pow(2).mean()


class LooksAtItsInput(Net):
    """Computes something else where its input has no data."""

    def forward(self, x: Tensor) -> Tensor:
        loss = super().forward(x)
        return loss + (loss.cos().exp().tanh().sigmoid() if type(x) is Tensor else 0)


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., None] = TrainingState.__init__

    def counting(self: TrainingState, *arguments: Any, **options: Any) -> None:
        COUNTS.snapshots += 1
        right(self, *arguments, **options)

    monkeypatch.setattr(TrainingState, "__init__", counting)


@pytest.fixture(scope="module")
def peaks() -> tuple[int, int]:
    """Return the smallest budget, and the plain peak."""
    model = Net()
    solver = Solver(tightfit.measure(model, BATCH, optimizer=torch.optim.AdamW(model.parameters())))
    return solver.minimum_budget()[0], solver.plain(0).plain_peak_bytes


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return everything that a step changes: which tensors there are, and their bytes."""
    tensors: dict[str, Tensor | None] = dict(model.state_dict(keep_vars=True))
    tensors |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    for number, entry in enumerate(optimizer.state.values()):
        tensors |= {f"{name} {number}": value for name, value in entry.items()}
    return {name: None if t is None else (id(t), t.detach().numpy().tobytes()) for name, t in tensors.items()}


def counted(model: nn.Module, *, trained: bool = False, **options: Any) -> tuple[tuple[int, int], tightfit.Verdict]:
    """Fit the model. Return how many whole steps and snapshots that took; the state is afterwards what it was."""
    optimizer = torch.optim.AdamW(model.parameters())
    if trained:
        model(BATCH).backward()
        optimizer.step()
    before, random_state = state_of(model, optimizer), RandomState()
    COUNTS.steps = COUNTS.snapshots = 0
    applied = tightfit.fit(model, BATCH, optimizer=optimizer, **options)
    found = COUNTS.steps, COUNTS.snapshots
    assert applied.profile is not None
    assert applied.steps_run == found[0] - (applied.profile.method == "real")
    assert state_of(model, optimizer) == before
    assert random_state.equals(RandomState())
    applied.remove()
    assert state_of(model, optimizer) == before
    assert applied.verdict is not None
    assert applied.verdict.ok is not False
    return found, applied.verdict


def test_a_plain_plan() -> None:
    """Under the meter once; plain twice; once each, timed.  A snapshot by measuring, and two by the trial."""
    found, verdict = counted(Net())
    assert (found, verdict.replayed_ops) == ((5, 3), 0)


@pytest.mark.parametrize("trained", [False, True], ids=["before the first step", "in training"])
def test_half_the_budget(trained: bool, peaks: tuple[int, int]) -> None:
    """And once for the self-checks."""
    found, verdict = counted(Net(), trained=trained, budget=sum(peaks) // 2, reference_budget_bytes=2**40)
    assert (found, verdict.method) == ((6, 3), "whole-step")
    assert verdict.replayed_ops > 0


def test_regions_are_compared_where_plain_does_not_fit(peaks: tuple[int, int]) -> None:
    """No plain steps; one more from which the regions' inputs are taken.  A snapshot for each region."""
    found, verdict = counted(Net(), budget=sum(peaks) // 2)
    assert (found, verdict.method) == ((4, 6), "per-region")


def test_a_repair_is_tried_in_the_same_trial(peaks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle forgets so much that the plain step seems to fit: that one is run under the meter, too."""
    measure = search.measure_together
    forgotten = peaks[1] - sum(peaks) // 2
    monkeypatch.setattr(
        search, "measure_together", lambda *a, **k: replace(measure(*a, **k), correction_bytes=-forgotten)
    )
    found, verdict = counted(Net(), budget=sum(peaks) // 2, reference_budget_bytes=2**40)
    assert (found, verdict.method) == ((7, 3), "whole-step")
    assert verdict.replayed_ops > 0


def test_a_real_measurement_begins_with_the_model_as_it_was_given() -> None:
    """Measuring for real is a step and a snapshot; the next trial run notes the state again."""
    found, verdict = counted(LooksAtItsInput(), grad_checkpoint="full")
    assert (found, verdict.method) == ((9, 6), "whole-step")


def test_verify_takes_the_same_steps(peaks: tuple[int, int]) -> None:
    model = Net()
    plan = tightfit.solve(tightfit.measure(model, BATCH), sum(peaks) // 2)
    COUNTS.steps = COUNTS.snapshots = 0
    verdict = tightfit.verify(model, BATCH, plan, reference_budget_bytes=2**40)
    assert verdict.ok is True
    assert (COUNTS.steps, COUNTS.snapshots) == (10, 2)
