"""The largest batch within a budget: found on profiles, and the truth found by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.errors import BudgetInfeasible, UnsupportedInput
from tightfit.planning.largest import largest_within


@pytest.mark.parametrize("size_of", [lambda n: 7 * n + 3, lambda n: n * n, lambda n: 100 * (n // 8), lambda n: 5])
@pytest.mark.parametrize("limit", [3, 10, 1000, 12345])
@pytest.mark.parametrize("begin", [1, 40, 300, 1000])
def test_the_largest_number_is_found_whatever_the_curve(size_of: Callable[[int], int], limit: int, begin: int) -> None:
    most = 300
    truth = max((n for n in range(1, most + 1) if size_of(n) <= limit), default=0)
    assert largest_within(size_of, limit, most=most, begin=begin) == truth


def test_a_straight_line_is_asked_rarely() -> None:
    asked: list[int] = []

    def size_of(number: int) -> int:
        asked.append(number)
        return 1000 + 37 * number

    assert largest_within(size_of, 10**6, most=10**6) == 27000
    assert len(asked) <= 4


def perceptron() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(3)))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


def grown(budget: int | str, **options: Any) -> tightfit.Growth:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return tightfit.grow(model, lambda n: torch.ones(n, 64), budget=budget, loss=loss, optimizer=optimizer, **options)


@pytest.mark.slow
def test_one_more_sample_has_no_plan() -> None:
    budget = 280 << 10
    found = grown(budget, most=256)
    assert found.confirmed
    assert 0 < found.plain_largest < found.largest
    assert found.plan.predicted_peak_bytes <= budget
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fits(number: int) -> bool:
        try:
            tightfit.fit(model, torch.ones(number, 64), budget=budget, loss=loss, optimizer=optimizer).remove()
        except BudgetInfeasible:
            return False
        return True

    assert fits(found.largest)
    assert not fits(found.largest + 2)


def test_a_card_that_is_not_here_is_asked_without_running_anything() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5))).to("meta")
    found = tightfit.grow(
        model, lambda n: torch.empty(n << 18, 64, device="meta"), budget="2GiB", loss=loss, device="cuda:8GiB", most=16
    )
    assert not found.confirmed
    assert found.plan.predicted_peak_bytes <= 2 << 30
    assert found.plain_largest < found.largest
    assert found.times[-1].batch_size == found.largest
    assert found.times[-1].plain_ms is None
    assert found.best in [one.batch_size for one in found.times]


def test_a_single_sample_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetInfeasible, match="too small"):
        grown("16KiB")


def test_no_batch_at_all_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="most=0"):
        grown("1MiB", most=0)
