"""Modules of any kind are called again in backward once a proof has shown that they bear it; others take the tape."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.promises.training import seed_everything, snapshot
from tests.replay.test_module_recompute import Net, batch, loss_of, planned_regions, recompute_all, step
from tests.support.wide_block import WIDTH, WideBlock
from tightfit.device import memory as meter
from tightfit.installation.applied import Applied
from tightfit.operators.pure_modules import is_pure
from tightfit.replay.values import AS_A_WHOLE
from tightfit.solver.solver import Solver


class Block(WideBlock):
    """Of a kind that nothing is promised of."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.dropout(F.gelu(self.widen(self.norm(x))), 0.1))


class Normalised(Block):
    """Moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.statistics(x))


class Rewriting(Block):
    """Writes into a buffer what it held: only its version moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.fill_(1)
        return super().forward(x) * self.scale


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


class Global:
    """What a module's code names, and nothing of the module leads to."""

    log: list[int] = []  # noqa: RUF012  # shared: that is the point


STEPS = 0


class CountingOutside(Block):
    """Changes a variable of its Python module."""

    def forward(self, x: Tensor) -> Tensor:
        global STEPS
        STEPS += 1
        return super().forward(x) * (1 + 0.01 * STEPS)


class LoggingOutside(Block):
    """Appends to a list that a function of its Python module names."""

    def forward(self, x: Tensor) -> Tensor:
        write_down(1)
        return super().forward(x)


def write_down(number: int) -> None:
    Global.log.append(number)


def closing(counter: list[int]) -> type[nn.Module]:
    """A block that changes what it closes over."""

    class Closing(Block):
        def forward(self, x: Tensor) -> Tensor:
            counter.append(1)
            return super().forward(x)

    return Closing


CLOSED_OVER: list[int] = []

BEAR: dict[str, Callable[[], nn.Module]] = {
    "plain": Block, "moves buffers": Normalised, "writes what was there": Rewriting, "changes attributes": Counting,
    "draws from Python and NumPy": PythonsNumbers,
}  # fmt: skip
DO_NOT_BEAR: dict[str, Callable[[], nn.Module]] = {
    "appends": Appending, "own generator": OwnGenerator, "counts outside": CountingOutside,
    "logs outside": LoggingOutside, "changes what it closes over": closing(CLOSED_OVER),
}  # fmt: skip


def outside() -> tuple[int, ...]:
    return STEPS, len(Global.log), len(CLOSED_OVER)


def forget_outside() -> None:
    global STEPS
    STEPS = 0
    Global.log.clear()
    CLOSED_OVER.clear()


@pytest.fixture(autouse=True)
def fresh_outside() -> None:
    forget_outside()


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
    left = outside()
    forget_outside()
    model = Net(DO_NOT_BEAR[kind])
    with applied_everywhere(model, batch()) as applied:
        forget_outside()  # measuring ran the model's code, too
        planned = trained(model, batch())
        assert outside() == left
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


def test_a_refusal_is_heeded_by_fit() -> None:
    model = Net(Appending)
    profile = tightfit.measure(model, batch(), loss=loss_of)
    free = replace(profile, module_ms_per_op=0.0, module_ms_per_call=0.0, mode_ms_per_op=1.0)
    smallest = tightfit.solve(free, budget_bytes=2**40).plain_peak_bytes * 2 // 3
    applied = tightfit.fit(model, batch(), budget=smallest, loss=loss_of, profile=free, reference_budget_bytes=2**40)
    assert applied.verdict is not None
    assert applied.verdict.ok
    assert {recipe.lever for recipe in applied.plan.recipes} == {"tape"}
    assert applied.profile is not None
    recomputable = {region.key: region.module_recomputable for region in applied.profile.regions}
    assert not any(recomputable[region.key] for region in applied.plan.regions if region.recipe >= 0)


def test_a_part_that_is_replaced_is_proven_anew() -> None:
    plain, model = Net(Block), Net(Block)
    with applied_everywhere(model, batch()) as applied:
        assert_equal(trained(plain, batch(), steps=1), trained(model, batch(), steps=1))
        for net in (plain, model):
            torch.manual_seed(7)
            net.blocks[1].norm = nn.PReLU()
            net.blocks[2].narrow = nn.Sequential(Appending(), nn.Linear(WIDTH, WIDTH))
            net.blocks[2].widen = nn.Linear(WIDTH, WIDTH)
        assert_equal(trained(plain, batch()), trained(model, batch()))
        assert set(applied.refused) == {"blocks.2#0"}


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


class Raw(torch.autograd.Function):
    """A kernel that the dispatcher does not see, as of Liger or flash-attn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.numpy()[...] = x.detach().numpy().clip(-1.5, 1.5)
        ctx.save_for_backward(out, x)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out, x = ctx.saved_tensors
        return gradients[0] * (out == x) + 0.01 * gradients[0] * out


class RawBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(Raw.apply(self.widen(self.norm(x))))


class Cells(nn.Module):
    """A loop over time, whose cells write parts of their gates in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, 48)
        self.out = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 48)
        for t in x.unbind(1):
            h, c = self.cell(t, (h, c))
        return self.out(h)


def checkpointed(model: nn.Module, calls: nn.Module | nn.ModuleList) -> None:
    for module in calls if isinstance(calls, nn.ModuleList) else [calls]:
        own = module.forward
        module.forward = lambda *args, own=own: checkpoint(own, *args, use_reentrant=False)  # type: ignore[method-assign]  # as users do it


def own_peak(make: Callable[[], nn.Module], data: Tensor) -> int:
    """The peak with each block (or cell) checkpointed."""
    model = make()
    checkpointed(model, getattr(model, "blocks", None) or model.cell)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    _, peak_bytes = meter.measure_peak(lambda: loss_of(model, data).backward(), meter.resident_bytes(model, data))
    return peak_bytes


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Net(RawBlock), id="raw kernels"),
        pytest.param(Cells, id="cells", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.slow
def test_what_no_tape_can_rebuild_is_dropped_as_checkpointing_does(make: Callable[[], nn.Module]) -> None:
    seed_everything()
    data = batch()
    profile = tightfit.measure(make(), data, loss=loss_of)
    with pytest.raises(tightfit.BudgetInfeasible) as caught:
        tightfit.solve(profile, budget_bytes=1)
    budget_bytes = own_peak(make, data)
    assert caught.value.required_bytes <= budget_bytes
    seed_everything()
    plain = trained(make(), data)
    seed_everything()
    model = make()
    applied = tightfit.fit(model, data, budget=budget_bytes, loss=loss_of, reference_budget_bytes=2**40)
    assert applied.verdict is not None
    assert applied.verdict.ok, applied.verdict.differing
    assert_equal(plain, trained(model, data))
    assert applied.statistics.recomputed_calls + applied.statistics.replayed_ops
    applied.remove()


def test_where_tapes_cost_more_than_they_save_modules_are_called_again() -> None:
    """With what tapes and second calls cost on small models: each operation takes less than writing it down."""
    model = Net(Block, count=6)
    profile = replace(
        tightfit.measure(model, batch(), loss=loss_of), mode_ms_per_op=0.01, tape_ms_per_op=0.03,
        module_ms_per_op=0.004, module_ms_per_call=0.05,
    )  # fmt: skip
    profile = replace(profile, signatures=tuple(replace(one, ms=0.005) for one in profile.signatures))
    plan = tightfit.solve(profile, budget_bytes=own_peak(lambda: Net(Block, count=6), batch()))
    assert {recipe.lever for recipe in plan.recipes} == {"module"}


class Surroundings(threading.local):
    """What a loss function sets around the forward alone: nothing of it can be seen in a module's code."""

    is_forward = False


SURROUNDINGS = Surroundings()


class OtherInBackward(Block):
    """Computes something else where forward is over."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if SURROUNDINGS.is_forward else x + self.narrow(F.gelu(self.widen(x)).exp())


class FailingInBackward(Block):
    """Raises where forward is over."""

    def forward(self, x: Tensor) -> Tensor:
        assert SURROUNDINGS.is_forward, "no forward runs"
        return super().forward(x)


def surrounded_loss(model: nn.Module, data: Tensor) -> Tensor:
    SURROUNDINGS.is_forward = True
    try:
        return loss_of(model, data)
    finally:
        SURROUNDINGS.is_forward = False


@pytest.mark.parametrize("kind", [OtherInBackward, pytest.param(FailingInBackward, marks=pytest.mark.exhaustive)])
def test_modules_whose_second_call_is_another_one_are_planned_otherwise(kind: type[nn.Module]) -> None:
    """The proof runs in forward and cannot see it; the first trial does, and all modules of the class are spared."""
    model = Net(kind, count=8)  # more than fit has rounds
    profile = tightfit.measure(model, batch(), loss=surrounded_loss)
    free = replace(profile, module_ms_per_op=0.0, module_ms_per_call=0.0, mode_ms_per_op=1.0)
    budget = (Solver(free).smallest().peak_bytes + tightfit.solve(free, 2**40).plain_peak_bytes) // 2
    assert any(recipe.executor == "module" for recipe in tightfit.solve(free, budget).recipes)
    applied = tightfit.fit(
        model, batch(), budget=budget, loss=surrounded_loss, profile=free, reference_budget_bytes=2**40
    )
    with applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert applied.verdict.replayed_ops
        assert all(recipe.executor != "module" for recipe in applied.plan.recipes)
