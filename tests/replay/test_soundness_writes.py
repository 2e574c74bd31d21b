"""Writes after a tensor was saved, or after a source was read: what plain autograd reads is what backward gets.

Where plain refuses, the engine refuses; where plain silently reads the new contents (`.data`, NumPy), so does the
engine; where plain has no more use for the old contents but replay has, they are put aside when the write is seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tightfit
from tests.replay.helpers import assert_same, differences, planned, run, snapshot
from tightfit.replay.installed import Installed
from tightfit.solver.solver import full_plan

Tensor = torch.Tensor


def by_ctypes(y: Tensor) -> None:
    (ctypes.c_float * y.numel()).from_address(y.data_ptr())[5] = 7.0


def by_kept_array(y: Tensor) -> None:
    np.asarray(y.detach())[2] = 7


#: Ways to write that no version counter shows.
HIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda y: y.data.mul_(3),
    "data of a view": lambda y: y.t().data[1].zero_(),
    "numpy": lambda y: y.detach().numpy().fill(7),
    "numpy of a view": lambda y: y[2:].detach().numpy().fill(7),
    "array": by_kept_array,
    "dlpack": lambda y: np.from_dlpack(y.detach()).__setitem__(3, 7),
    "ctypes": by_ctypes,
    "storage": lambda y: y.untyped_storage().fill_(0),
}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=list(HIDDEN))
@pytest.mark.parametrize("when", ["saved", "saved and read", "read", "second call"])
def test_a_hidden_write_in_the_region(hidden: Callable[[Tensor], Any], when: str) -> None:
    count = 0

    def function(x: Tensor, w: Tensor) -> Tensor:
        nonlocal count
        count += 1
        y = x @ w
        z = y.sin() if when != "read" else y.detach() * w.sum()  # sin saves y
        if when != "second call" or count % 2 == 0:
            hidden(y)
        return z * y.detach().cos().exp() if when == "saved and read" else z.exp()

    calls = 2 if when == "second call" else 1
    plain = run(function, replay=False, calls=calls)
    count = 0
    replayed = run(function, replay=True, calls=calls)
    assert plain.error is None
    assert replayed.error is None
    assert differences(plain.tensors, replayed.tensors) == []


def test_memory_handed_out_before_it_is_used_may_be_written_at_any_time() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).detach()
        array = y.numpy()
        early = y.exp() * x  # reads y as it is now
        array[:] = 3
        return early * y.sin() * (x @ w).exp()

    for calls in (1, 2):
        assert assert_same(function, calls=calls).replayed_ops > 0  # the rest is still replayed


class Reads(nn.Module):
    """Needs `table` for replay, not for autograd."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return (x + table).sin().exp()


class Writes(nn.Module):
    def forward(self, x: Tensor, table: Tensor, how: str) -> Tensor:
        if how == "in place":
            table.add_(1)
        elif how == "data":
            table.data.add_(1)
        elif how == "numpy":
            table.numpy()[:] = 4
        elif how == "copy":
            table.copy_(x.detach())
        else:
            F.batch_norm(x, table[0], table[1], training=True)
        return x.cos()


class ReadsThenWrites(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.reads, self.writes, self.how = nn.Linear(8, 8), Reads(), Writes(), how
        self.register_buffer("table", torch.ones(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.writes(self.reads(self.linear(x), self.table), self.table, self.how)


def step(model: nn.Module) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(torch.randn(4, 8)).sum()
    loss.backward()
    return snapshot(model, loss)


@pytest.mark.parametrize("how", ["in place", "data", "numpy", "copy", "statistics"])
@pytest.mark.parametrize("paths", [("reads", "writes", ""), ("reads", "")])
@pytest.mark.parametrize("self_check", [True, False])
def test_a_source_written_in_a_later_region(how: str, paths: tuple[str, ...], self_check: bool) -> None:
    plain = step(ReadsThenWrites(how))
    model = ReadsThenWrites(how)
    with planned(model, *paths) as installed:
        installed.self_check = self_check
        assert differences(plain, step(model)) == []
    assert installed.statistics.replayed_ops > 0


@pytest.mark.parametrize("how", ["in place", "copy", "statistics", "numpy"])
def test_a_source_written_in_a_later_region_is_known_to_the_plan(how: str) -> None:
    """The plan keeps what is computed from it, wherever the write happens: in an untouched region, too."""
    model = ReadsThenWrites(how)
    profile = tightfit.measure(model, torch.randn(4, 8), loss=lambda m, x: m(x).sum())
    plan = full_plan(profile, 2**30)
    plain = step(ReadsThenWrites(how))
    fresh = ReadsThenWrites(how)
    with tightfit.apply(fresh, plan) as applied:
        assert differences(plain, step(fresh)) == []
        assert applied.statistics.written_after_drop == 0


def test_statistics_read_in_one_region_and_moved_by_batch_norm_in_another() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
            assert norm.running_var is not None
            return (x * norm.running_var.add(1).exp()).sin() * norm.running_var.cos()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.scale, self.norm = nn.Linear(8, 8), Scale(), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.scale(self.linear(x), self.norm)).exp()

    plain = step(Net())
    for paths in (("scale",), ("scale", "norm"), ("", "scale"), ("",)):  # the normalisation is watched, or is not
        for self_check in (True, False):
            model = Net()
            with planned(model, *paths) as installed:
                installed.self_check = self_check
                assert differences(plain, step(model)) == []
            assert installed.statistics.replayed_ops > 0
    model = Net()
    plan = full_plan(tightfit.measure(model, torch.randn(4, 8), loss=lambda m, x: m(x).sum()), 2**30)
    with tightfit.apply(model, plan) as applied:
        assert differences(plain, step(model)) == []
        assert applied.statistics.replayed_ops > 0


def test_statistics_moved_between_forward_and_backward_that_the_plan_did_not_know() -> None:
    """A training forward without gradients, between the step's forward and its backward: nothing watches it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor, moves: bool = False) -> Tensor:
            assert self.norm.running_var is not None
            if moves:
                return self.norm(x)
            return (self.linear(x) * self.norm.running_var.add(1).exp()).sin()

    batch = torch.randn(4, 8)
    plain, model = Net(), Net()

    def step_of(model: Net, moves: bool) -> dict[str, Tensor | None]:
        model.zero_grad()
        loss = model(batch).sum()
        if moves:
            with torch.no_grad():
                model(batch, moves=True)
        loss.backward()
        return snapshot(model, loss)

    plan = full_plan(tightfit.measure(model, batch, loss=lambda m, x: m(x).sum()), 2**30)
    with tightfit.apply(model, plan) as applied:
        for moves in (False, True, False):
            assert differences(step_of(plain, moves), step_of(model, moves)) == []
        assert applied.statistics.replayed_ops > 0


def test_the_next_forward_moves_what_a_pending_backward_needs() -> None:
    """Two forwards, then two backwards: the second forward writes what the first graph's replay reads."""

    def both(context: Callable[[], Any]) -> list[Tensor | None]:
        torch.manual_seed(0)
        model, table = nn.Linear(8, 8), torch.ones(4, 8)
        losses = []
        for _ in range(2):
            with context():
                losses.append(((model(torch.randn(4, 8)) + table).sin().exp()).sum())
                table.mul_(1.5)
        for loss in losses:
            loss.backward()
        return [p.grad for p in model.parameters()]

    import contextlib

    plain = both(contextlib.nullcontext)
    installed = Installed(recipes={})
    replayed = both(lambda: installed.region("r"))
    assert installed.statistics.replayed_ops > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))  # type: ignore[arg-type]  # none is None


@pytest.mark.parametrize("where", ["inside", "outside", "another region"])
def test_a_dropped_tensor_overwritten_is_refused_as_plain_refuses_it(where: str) -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        y = x @ w
        z = y.sin()
        if where == "inside":
            y.mul_(2)
        return z, y

    installed = Installed(recipes={})
    for replay in (False, True):
        torch.manual_seed(0)
        x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
        if replay:
            with installed.region("r"):
                z, y = function(x, w)
        else:
            z, y = function(x, w)
        if where == "outside":
            y.mul_(2)
        elif where == "another region":
            with installed.region("s"):
                y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (z.sum() + y.sum()).backward()
    assert installed.statistics.dropped_slots > 0


@pytest.mark.parametrize("rows", [1, 2000])
@pytest.mark.parametrize("self_check", [True, False])
def test_a_source_written_after_the_step_s_forward(rows: int, self_check: bool) -> None:
    """Nobody saw the write: a small one is known from its mark, else replay refuses (plain has no use for it)."""
    table = torch.ones(rows, 16)

    def backward(loss: Tensor) -> None:
        table.add_(1)
        loss.backward()

    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x[:1] + table).exp() @ w

    plain = run(function, replay=False, backward=backward)
    table.fill_(1)
    replayed = run(function, replay=True, backward=backward, self_check=self_check)
    if rows == 1 and not self_check:
        assert differences(plain.tensors, replayed.tensors) == []
    else:
        assert "modified in place after the region that used it ended" in str(replayed.error)
