"""Memory that code outside PyTorch begins to write only when training runs: gradients are plain's, or an error.

As a codebook that is reset after some steps through a NumPy array made in ``__init__``, or a table that a kernel of an
extension rescales.  Neither the plan nor a region's self-check has seen such a write, and no version counter moves.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.replay.helpers import differences, snapshot
from tests.replay.test_module_recompute import recompute_all
from tightfit.errors import PromiseWarning
from tightfit.replay.refusals import CannotRebuild
from tightfit.solver.solver import full_plan

Tensor = torch.Tensor
SMALL, LARGE = 16, 600  # rows of 32 numbers: 2 KiB, whose mark is a copy, and 75 KiB, whose mark is a checksum


def by_array(table: Tensor) -> Callable[[], None]:
    array = table.numpy()
    return lambda: array.__imul__(1.25)


def by_address(table: Tensor) -> Callable[[], None]:
    """As a kernel does that was handed the tensor: PyTorch sees nothing, neither then nor now."""
    memory = (ctypes.c_float * table.numel()).from_address(table.data_ptr())

    def write() -> None:
        memory[: len(memory)] = [1.25 * number for number in memory]

    return write


class Table(nn.Module):
    """A buffer that is read, written when `writes` says so, and perhaps read again."""

    def __init__(self, rows: int, how: Callable[[Tensor], Callable[[], None]]) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("table", torch.rand(rows, 32) + 0.5)
        self.write = how(self.table)
        self.writes = ""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x) * torch.sigmoid(self.table * 2))
        if self.writes:
            self.write()
        return (x + h) * torch.sigmoid(self.table) if self.writes == "and reads" else x + h


class Net(nn.Module):
    def __init__(self, rows: int, how: Callable[[Tensor], Callable[[], None]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Table(rows, how) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks(x)
        return found


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).mean()  # type: ignore[no-any-return]  # calls of modules are not annotated


def batch_of(model: Net) -> Tensor:
    return torch.randn(len(model.blocks[0].table), 32, generator=torch.Generator().manual_seed(1))


def step(model: Net, writes: str = "") -> dict[str, Tensor | None]:
    """Loss, gradients and buffers; the buffers are put back."""
    before = [block.table.clone() for block in model.blocks]
    model.zero_grad()
    for block in model.blocks:
        block.writes = writes
    try:
        loss = loss_of(model, batch_of(model))
        if writes == "before backward":
            for block in model.blocks:
                block.write()
        loss.backward()
        return snapshot(model, loss)
    finally:
        for block, table in zip(model.blocks, before, strict=True):
            block.table.copy_(table)


def plan_of(model: Net, executor: str) -> tightfit.Plan:
    profile = tightfit.measure(model, batch_of(model), loss=loss_of)
    return full_plan(profile, 2**30) if executor == "tape" else recompute_all(profile)


WRITES = ["once", "and reads", "before backward"]


@pytest.mark.parametrize("executor", ["tape", "module"])
@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("how", [by_array, by_address])
def test_a_small_one_is_recomputed_from_what_it_held(how: Any, writes: str, executor: str) -> None:
    plain, model = Net(SMALL, how), Net(SMALL, how)
    with tightfit.apply(model, plan_of(model, executor)) as applied:
        for late in ("", "", writes, writes, ""):
            assert differences(step(plain, late), step(model, late)) == []
        assert applied.statistics.replayed_ops > 0


@pytest.mark.parametrize("executor", ["tape", "module"])
@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("how", [by_array, by_address])
def test_of_a_large_one_the_first_write_is_an_error_and_later_ones_are_right(
    how: Any, writes: str, executor: str
) -> None:
    plain, model = Net(LARGE, how), Net(LARGE, how)
    with tightfit.apply(model, plan_of(model, executor)) as applied:
        for _ in range(2):
            assert differences(step(plain), step(model)) == []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(RuntimeError, match="tightfit cannot rebuild a saved tensor"):
                step(model, writes)
            with suppress(CannotRebuild):  # backward may meet one of them at a time
                step(model, writes)
            assert differences(step(plain, writes), step(model, writes)) == []
        told = [str(one.message) for one in caught if one.category is PromiseWarning]
        assert len(told) == 1
        assert "behind PyTorch's back" in told[0]
        for late in (writes, "", writes):
            assert differences(step(plain, late), step(model, late)) == []
        assert applied.statistics.replayed_ops > 0


def test_parts_of_one_storage_are_looked_at_where_they_are_read() -> None:
    """A batch that is a part of a data set: what else is written there is nobody's concern."""
    data = torch.randn(64, SMALL, 1024)
    array = data.numpy()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 8), nn.Tanh())
    with tightfit.apply(model, full_plan(tightfit.measure(model, data[0], loss=loss_of), 2**30)):
        loss_of(model, data[0]).backward()
        for place in range(3):
            loss = loss_of(model, data[place])
            array[place + 1] = 7
            loss.backward()
        loss = loss_of(model, data[4])
        array[4] = 7
        with pytest.raises(CannotRebuild, match="behind PyTorch's back"):
            loss.backward()
