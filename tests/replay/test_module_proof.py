"""Modules of any kind are called again in backward once a proof has shown that they bear it; others take the tape."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tightfit
from tests.promises.training import seed_everything, snapshot
from tests.replay.test_module_recompute import Net, batch, loss_of, planned_regions, recompute_all, step
from tightfit.installation.applied import Applied
from tightfit.operators.pure_modules import is_pure
from tightfit.replay.session import AS_A_WHOLE

WIDTH = 32


class Block(nn.Module):
    """Of a kind that nothing is promised of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.dropout(F.gelu(self.widen(self.norm(x))), 0.1))


class Normalised(Block):
    """Moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.statistics(x))


class Spectral(Block):
    """Computes with buffers that it moves first."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.utils.spectral_norm(self.widen)


class Counting(Block):
    """Computes with an attribute that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.latest: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.latest = x.detach().mean(-1)
        return super().forward(x * (1 + 0.1 * self.calls))


class PythonsNumbers(Block):
    """Draws from the generators of Python and NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * random.uniform(0.5, 1.5)) * float(np.random.rand())


class Appending(Block):
    """Writes into a container: that cannot be put back."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(1.0)
        return super().forward(x) * len(self.history)


class OwnGenerator(Block):
    """Draws from a generator that nobody else knows."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.numbers.uniform(0.5, 1.5)


BEAR: dict[str, Callable[[], nn.Module]] = {
    "plain": Block, "moves buffers": Normalised, "changes attributes": Counting,
    "draws from Python and NumPy": PythonsNumbers,
}  # fmt: skip
DO_NOT_BEAR: dict[str, Callable[[], nn.Module]] = {"appends": Appending, "own generator": OwnGenerator}


def applied_everywhere(model: nn.Module, data: Tensor) -> Applied:
    plan = recompute_all(tightfit.measure(model, data, loss=loss_of))
    assert [key for key in planned_regions(plan) if key.startswith("blocks")]
    return tightfit.apply(model, plan)


def trained(model: nn.Module, data: Tensor, steps: int = 3) -> list[Any]:
    seed_everything(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        found.append(snapshot(model, loss))
        optimizer.step()
    return found


def assert_equal(first: list[Any], second: list[Any]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
            assert same, name


@pytest.mark.parametrize("kind", BEAR)
def test_what_a_call_moves_is_put_back_and_every_bit_is_equal(kind: str) -> None:
    plain = trained(Net(BEAR[kind]), batch())
    model = Net(BEAR[kind])
    assert not is_pure(model.blocks[0])
    with applied_everywhere(model, batch()) as applied:
        planned = trained(model, batch())
        assert not applied.refused
        assert applied.statistics.recomputed_calls == 9
        assert applied.statistics.taped_ops == 0
    assert_equal(plain, planned)
    if kind == "changes attributes":
        assert [block.calls for block in model.blocks] == [3, 3, 3]


@pytest.mark.parametrize("kind", DO_NOT_BEAR)
def test_what_cannot_be_put_back_takes_the_tape(kind: str) -> None:
    plain = trained(Net(DO_NOT_BEAR[kind]), batch())
    model = Net(DO_NOT_BEAR[kind])
    with applied_everywhere(model, batch()) as applied:
        planned = trained(model, batch())
        assert set(applied.refused) == {"blocks.0#0", "blocks.1#0", "blocks.2#0"}
        assert all(AS_A_WHOLE in positions for positions in applied.refused.values())
        assert applied.statistics.recomputed_calls == 0
        assert applied.statistics.taped_ops > 0
    assert_equal(plain, planned)


def test_hooks_inside_are_called_once() -> None:
    """Spectral normalisation is a hook that moves buffers."""
    model = Net(Spectral)
    profile = tightfit.measure(model, batch(), loss=loss_of)
    assert not [region for region in profile.regions if region.module_recomputable and region.key.startswith("blocks")]


def test_a_refusal_is_heeded_by_fit_and_promises_spare_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(Appending)
    profile = tightfit.measure(model, batch(), loss=loss_of)
    free = replace(profile, module_ms_per_op=0.0, module_ms_per_call=0.0, mode_ms_per_op=1.0)
    smallest = tightfit.solve(free, budget_bytes=2**40).plain_peak_bytes * 2 // 3
    applied = tightfit.fit(model, batch(), budget=smallest, loss=loss_of, profile=free, reference_budget_bytes=2**40)
    assert applied.verdict is not None
    assert applied.verdict.ok
    assert {recipe.lever for recipe in applied.plan.recipes} == {"tape"}
    assert applied.profile is not None
    assert not any(region.module_recomputable for region in applied.profile.regions if "blocks" in region.key)


def test_attributes_and_modes_that_change_between_forward_and_backward_are_those_of_forward() -> None:
    class Scaling(Block):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale)

    def one(model: nn.Module) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        model.zero_grad()
        loss = loss_of(model, batch())
        for block in model.blocks:
            block.scale = 2.0
        model.eval()
        loss.backward()
        model.train()
        for block in model.blocks:
            assert block.scale == 2.0
            block.scale = 1.0
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = Net(Scaling)
    for block in model.blocks:
        block.scale = 1.0
    plain = one(model)
    with applied_everywhere(model, batch()) as applied:
        step(model, batch())
        planned = one(model)
        assert applied.statistics.recomputed_calls == 6
    for name, value in plain.items():
        assert torch.equal(value, planned[name]), name
