"""Budgets: what they are read from, what is left for the step, and in what terms errors speak."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tightfit
from tightfit import Budget, BudgetInfeasible, UnsupportedInput
from tightfit.device import device_for

CPU = torch.device("cpu")
WHOLE_BYTES = device_for(CPU).capacity_bytes()


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [("75%", int(WHOLE_BYTES * 0.75)), ("1GiB", 2**30), ("100MB", 10**8), (12345, 12345), ("12345", 12345)],
)
def test_what_is_read(given: int | str, nbytes: int) -> None:
    budget = Budget.of(given, CPU)
    assert (budget.total_bytes, budget.step_bytes, budget.is_auto) == (nbytes, nbytes, False)
    assert budget.text == ("" if isinstance(given, int) else given)
    assert Budget.of(budget, CPU) is budget


def test_auto_is_what_is_free() -> None:
    budget = Budget.of(" Auto ", CPU)
    assert 0 < budget.total_bytes <= WHOLE_BYTES
    assert budget.is_auto


@pytest.mark.parametrize("given", ["much", "-3GiB", 0, "200%", Budget(total_bytes=2 * WHOLE_BYTES)])
def test_what_is_no_budget_here(given: int | str | Budget) -> None:
    with pytest.raises(UnsupportedInput, match="--memory"):
        Budget.of(given, CPU, name="--memory")


def test_the_step_has_what_is_not_reserved() -> None:
    budget = Budget.of("1KiB", CPU).reserving(300).reserving(24)
    assert (budget.total_bytes, budget.beside_step_bytes, budget.step_bytes) == (1024, 324, 700)
    assert budget.text == "1KiB"
    with pytest.raises(UnsupportedInput, match=r"1\.0 KiB, and 1\.0 KiB of it are reserved .* Give a larger budget"):
        budget.reserving(700)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.blocks(x).pow(2).mean()
        return result


def test_fit_plans_within_the_step_s_part_and_speaks_of_the_total() -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    with tightfit.fit(Blocks(), batch, budget=Budget(total_bytes=2**20, beside_step_bytes=2**19)) as applied:
        assert applied.plan.budget_bytes == 2**19
    with pytest.raises(BudgetInfeasible) as alone:
        tightfit.fit(Blocks(), batch, budget=2000)
    with pytest.raises(BudgetInfeasible) as beside:
        tightfit.fit(Blocks(), batch, budget=Budget(total_bytes=3000, beside_step_bytes=1000))
    assert beside.value.budget_bytes == 3000
    assert beside.value.required_bytes == alone.value.required_bytes + 1000
    assert "3000" in str(beside.value) or "2.9 KiB" in str(beside.value)


def test_a_later_batch_that_does_not_fit_speaks_of_the_total_too() -> None:
    torch.manual_seed(0)
    plain_bytes = tightfit.fit(Blocks(), torch.randn(64, 16)).plan.plain_peak_bytes
    budget = Budget(total_bytes=plain_bytes + 1000, beside_step_bytes=1000)
    with tightfit.fit(Blocks(), torch.randn(64, 16), budget=budget) as applied:
        with pytest.raises(BudgetInfeasible) as caught:
            applied.prepare(torch.randn(64_000, 16))
        assert caught.value.budget_bytes == plain_bytes + 1000
