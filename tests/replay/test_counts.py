"""Exact counts for small computations whose answers can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.replay.helpers import PATH, retained_bytes
from tightfit.records import Plan
from tightfit.replay.installed import Installed
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver.columns import keeping
from tightfit.solver.plan_builder import build_plan
from tightfit.solver.solver import full_plan

Tensor = torch.Tensor
ROWS, WIDTH = 32, 64
BYTES = ROWS * WIDTH * 4


def chain(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).sin().exp().tanh()


def branches(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y.sin() * y.cos()


def views(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).view(2, -1).t()[3:5].sin()


def in_place(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).mul_(2).sin()


def forked(x: Tensor, w: Tensor) -> Tensor:
    """One saved value of an operation with two results."""
    return (x @ w).max(1)[0].sin()


# taped: every operation that is not a view. dropped: savings of what the region made. replayed: those of them that
# some dropped value needs.
@pytest.mark.parametrize(
    ("function", "taped", "dropped", "replayed"),
    [
        # mm saves x and w (from outside); sin saves mm's result, exp and tanh save their own.
        (chain, 4, 3, 4),
        # sin and cos save y, the product saves both; y, sin and cos are replayed, the product is not.
        (branches, 4, 4, 3),
        (views, 2, 1, 1),
        # mul_ by a number saves nothing; sin saves what mul_ made of mm's result.
        (in_place, 3, 1, 2),
        # max saves its indices, sin its input: the same operation, replayed once.
        (forked, 3, 2, 2),
        (lambda x, w: x.sin(), 1, 0, 0),
    ],
    ids=["chain", "branches", "views", "in place", "two results", "nothing to drop"],
)
def test_operations(function: Callable[[Tensor, Tensor], Tensor], taped: int, dropped: int, replayed: int) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    w = torch.randn(WIDTH, WIDTH, requires_grad=True)
    installed = Installed(recipes={}, self_check=False)
    with installed.region(PATH):
        result = function(x, w)
    counts = installed.statistics
    assert (counts.taped_ops, counts.dropped_slots, counts.kept_unsafe, counts.replayed_ops) == (taped, dropped, 0, 0)
    result.sum().backward()
    assert counts.replayed_ops == replayed
    assert counts.unplanned_calls == 1


def test_bytes_held_after_forward() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    w = torch.randn(WIDTH, WIDTH, requires_grad=True)
    plain, plain_bytes = retained_bytes(lambda: chain(x, w).sum())
    assert plain_bytes == 3 * BYTES + 4  # mm, exp, tanh and the sum
    del plain

    def planned() -> Tensor:
        with Installed(recipes={}, self_check=False).region(PATH):
            y = chain(x, w)
        return y.sum()

    loss, planned_bytes = retained_bytes(planned)
    assert planned_bytes == 4
    grads, backward_bytes = retained_bytes(lambda: torch.autograd.grad(loss, (x, w)))
    assert backward_bytes == (ROWS * WIDTH + WIDTH * WIDTH) * 4
    del grads


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, self.w).sum()


def plan_keeping(model: nn.Module, batch: Any, keep: frozenset[tuple[int, int]]) -> Plan:
    profile = tightfit.measure(model, batch)
    index = ProfileIndex(profile)
    regions = [i for i, region in enumerate(profile.regions) if region.op_count >= 4]
    decisions = [BY_VALUE.decide(keep) if i in regions else None for i in range(len(profile.regions))]
    return build_plan(index, decisions, 2**40)


# Positions in the region: mm 0, sin 1, exp 2, tanh 3, sum 4.
@pytest.mark.parametrize(
    ("keep", "held_values", "replayed"),
    [
        (frozenset(), 0, 4),
        (frozenset({(0, 0)}), 1, 3),
        (frozenset({(2, 0)}), 1, 2),  # mm for sin, tanh from exp
        (frozenset({(3, 0)}), 1, 3),
        (frozenset({(0, 0), (2, 0)}), 2, 1),
        (frozenset({(1, 0)}), 1, 3),  # sin's result is not saved, but a shortcut to exp
    ],
)
def test_any_choice_of_kept_values(keep: frozenset[tuple[int, int]], held_values: int, replayed: int) -> None:
    torch.manual_seed(0)
    model = Chain()
    batch = torch.randn(ROWS, WIDTH)
    plan = plan_keeping(model, batch, keep)
    assert len(plan.recipes) == 1
    assert plan.recipes[0].held_bytes == held_values * BYTES
    with tightfit.apply(model, plan) as applied:
        model(batch).backward()  # the self-check
        model.zero_grad()
        applied.statistics.reset()
        loss, held = retained_bytes(lambda: model(batch))
        assert held == held_values * BYTES + 4
        loss.backward()
        assert applied.statistics.replayed_ops == replayed
        assert applied.statistics.mismatches == 0


def test_the_simulator_counts_as_the_engine_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())
                            for _ in range(3)])  # fmt: skip
    batch = torch.randn(4, 8)
    profile = tightfit.measure(model, batch, loss=lambda m, b: m(b).sum())
    index = ProfileIndex(profile)
    predicted = simulate(index, [BY_VALUE.decide(())] * len(profile.regions))
    with tightfit.apply(model, full_plan(profile, 2**40)) as applied:
        for _ in range(2):
            applied.statistics.reset()
            with applied.step():
                loss = model(batch).sum()
            loss.backward()
        assert applied.statistics.replayed_ops == len(predicted.replayed_ops) > 0
        assert (applied.statistics.mismatches, applied.statistics.kept_unsafe) == (0, 0)


class Splits(nn.Module):
    """Splits copies that die at once, unsafely, between saving one value after another."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for _ in range(20):
            x.detach().clone().unsafe_chunk(2)
            x = x.sin()
        return x


def test_what_lies_where_a_split_storage_lay_is_dropped() -> None:
    """The parts that `unsafe_chunk` gives have version counters of their own, so their storage alone is kept."""
    model, batch = Splits(), torch.randn(ROWS, WIDTH)
    profile = tightfit.measure(model, batch, loss=lambda m, b: m(b).sum())
    with tightfit.apply(model, full_plan(profile, 2**40)) as applied:
        dropped = []
        for _ in range(2):
            applied.statistics.reset()
            with applied.step():
                loss = model(batch).sum()
            loss.backward()
            dropped.append(applied.statistics.dropped_slots)
    assert dropped == [20, 20]


class Tries(nn.Module):
    """Tries a product that fails before the one that does not: once where the plan has that operation, once not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def attempt(self, x: Tensor) -> Tensor:
        try:
            return self.layer(x[:, 1:])
        except RuntimeError:
            return x

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(self.attempt(x)).sin()
            x = self.attempt(x).exp().tanh()
        return x


@pytest.mark.parametrize("decide", ["keep all", "keep some", "drop all"])
def test_an_operation_that_fails_does_not_end_the_plan(decide: str) -> None:
    model, batch = Tries(), torch.randn(ROWS, WIDTH)
    profile = tightfit.measure(model, batch, loss=lambda m, b: m(b).sum())
    index = ProfileIndex(profile)
    optional = sorted(index.facts[1].optional)
    kept = optional[{"keep all": 0, "keep some": len(optional) // 2, "drop all": len(optional)}[decide] :]
    plan = build_plan(index, [None, keeping(index, kept), None], 2**40)
    with tightfit.apply(model, plan) as applied:
        for _ in range(2):
            applied.statistics.reset()
            with applied.step():
                loss = model(batch).sum()
            loss.backward()
    assert applied.statistics.mismatches == 0
    assert applied.statistics.replayed_ops == len(simulate(index, plan.decisions).replayed_ops)


def test_an_ample_budget_installs_nothing() -> None:
    model = Chain()
    batch = torch.randn(ROWS, WIDTH)
    with tightfit.fit(model, batch, budget="1GiB") as applied:
        assert applied.plan.is_plain
        assert not applied.installed
        # Only the model itself is watched, for batches of other shapes.
        assert all("forward" not in vars(module) for module in model.modules() if module is not model)
        model(batch).backward()
        assert applied.statistics.taped_ops == 0


def test_each_operation_is_replayed_at_most_once_in_a_backward() -> None:
    """Two readers of one value, far apart in backward: memoised in between."""
    x = torch.randn(8, 8, requires_grad=True)
    installed = Installed(recipes={}, self_check=False)
    with installed.region(PATH):
        y = (x * 2).sin()  # sin's input is saved
        z = y.exp().tanh().sigmoid() * y  # y is read first and last
    z.sum().backward()
    assert installed.statistics.replayed_ops == 5


def test_nothing_is_held_after_backward() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)

    def step() -> Tensor:
        installed = Installed(recipes={}, self_check=False)
        with installed.region(PATH):
            y = x * 2
            for _ in range(6):
                y = y.sin()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert installed.statistics.replayed_ops == 6
        return gradient

    gradient, held = retained_bytes(step)
    assert held == BYTES == gradient.untyped_storage().nbytes()
