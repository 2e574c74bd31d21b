"""Several backwards over one graph: what one rebuilds does not stay for the next, and all give the plain bits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tightfit
from tests.support.wide_block import WIDTH, WideBlock
from tightfit.device import memory as meter
from tightfit.errors import PromiseWarning
from tightfit.records import Profile
from tightfit.replay.replayer import Replayer

BATCH = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1))

Backwards = Callable[[nn.Module, Tensor], Any]


class Block(WideBlock):
    """With random numbers, and an operation in place on what it made."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.widen(self.norm(x))), 0.1)
        return x + self.narrow(hidden.mul(1.5).relu_())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def twice(model: nn.Module, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def three_times(model: nn.Module, loss: Tensor) -> None:
    for _ in range(2):
        loss.backward(retain_graph=True)
    loss.backward()


def add_gradients(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
        assert parameter.grad is not None
        parameter.grad.add_(gradient)


def parts_one_by_one(model: nn.Module, loss: Tensor) -> None:
    """As PCGrad and its like ask for the gradients of several losses."""
    for factor in (1.0, 0.5, 0.25):
        add_gradients(loss * factor, list(model.parameters()))


def only_the_last_blocks(model: Any, loss: Tensor) -> None:
    """Backward ends in the middle; the next goes all the way."""
    add_gradients(loss, list(model.blocks[3].parameters()))
    loss.backward()


def after_one_that_failed(model: Any, loss: Tensor) -> None:
    def fail(gradient: Tensor) -> None:
        raise KeyError("on purpose")

    hook = model.blocks[2].widen.weight.register_hook(fail)
    with pytest.raises(KeyError, match="on purpose"):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    hook.remove()
    loss.backward()


def with_a_look_at_what_is_saved(model: Any, loss: Tensor) -> None:
    """A saved tensor is read by a hook, before and after its own node has read it."""
    looked: list[Tensor] = []
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if type(node).__name__ == "ReluBackward0":
            node.register_prehook(lambda _, node=node: looked.append(node._saved_result.sum()))
            node.register_hook(lambda *_, node=node: looked.append(node._saved_result.sum()))
            break
        nodes += [following for following, _ in node.next_functions]
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(looked) == 4
    assert len({float(total) for total in looked}) == 1


WAYS: list[Backwards] = [
    twice, three_times, parts_one_by_one, only_the_last_blocks, after_one_that_failed
]  # fmt: skip


@cache
def profile_of(*, keeps_graph: bool) -> Profile:
    return tightfit.measure(Net(), BATCH, step=tightfit.Step(loss=loss_of, retain_graph=keeps_graph))


def step(loss: Callable[..., Tensor], model: nn.Module, backwards: Backwards) -> tuple[list[Tensor], int]:
    """The gradients, and the peak."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.manual_seed(7)
    resident = meter.resident_bytes(model, BATCH)
    _, peak_bytes = meter.measure_peak(lambda: backwards(model, loss(model, BATCH)), resident)
    return [parameter.grad.clone() for parameter in model.parameters()], peak_bytes


def beside_bytes(model: nn.Module, backwards: Backwards) -> int:
    """What `torch.autograd.grad` returns is beside the gradients that the budget counts."""
    returned = backwards in (parts_one_by_one, after_one_that_failed)
    return sum(parameter.nbytes for parameter in model.parameters()) if returned else 0


@pytest.mark.parametrize("backwards", WAYS)
def test_steps_that_are_said_to_keep_their_graphs_keep_the_smallest_budget_from_the_first_on(
    backwards: Backwards,
) -> None:
    torch.manual_seed(0)
    model = Net()
    plain, plain_bytes = step(loss_of, model, backwards)
    kept = tightfit.Step(loss=loss_of, retain_graph=True)
    profile = profile_of(keeps_graph=True)
    budget_bytes = tightfit.frontier(profile, points=2)[0].predicted_peak_bytes
    assert budget_bytes < 0.6 * plain_bytes
    with tightfit.fit(model, BATCH, budget=budget_bytes, step=kept, profile=profile) as applied:
        for _ in range(2):
            planned, peak_bytes = step(applied.loss, model, backwards)
            assert all(map(torch.equal, plain, planned))
            assert peak_bytes <= budget_bytes + beside_bytes(model, backwards)
        assert applied.plans is not None
        assert applied.plans.statistics.replanned == 0


@pytest.mark.parametrize(
    "backwards",
    [
        three_times,
        pytest.param(twice, marks=pytest.mark.exhaustive),
        parts_one_by_one,
        pytest.param(only_the_last_blocks, marks=pytest.mark.exhaustive),
        after_one_that_failed,
    ],
)
def test_other_budgets_are_kept_once_a_backward_that_keeps_its_graph_was_seen(backwards: Backwards) -> None:
    torch.manual_seed(0)
    model = Net()
    plain, plain_bytes = step(loss_of, model, backwards)
    profile = profile_of(keeps_graph=False)
    smallest_bytes = tightfit.frontier(profile, points=2)[0].predicted_peak_bytes
    budget_bytes = int(smallest_bytes + 0.3 * (plain_bytes - smallest_bytes))
    with tightfit.fit(model, BATCH, budget=budget_bytes, loss=loss_of, profile=profile) as applied:
        first, _ = step(applied.loss, model, backwards)
        assert all(map(torch.equal, plain, first))
        assert applied.plans is not None
        assert applied.plans.statistics.replanned == 0
        with pytest.warns(PromiseWarning, match="retain_graph=True.* took up to .* From now on"):
            applied.prepare(BATCH)
        for _ in range(2):
            planned, peak_bytes = step(applied.loss, model, backwards)
            assert all(map(torch.equal, plain, planned))
            assert peak_bytes <= budget_bytes + beside_bytes(model, backwards)
        assert applied.plans.statistics.replanned == 1
        assert applied.plan.predicted_peak_bytes <= budget_bytes
        backwards(model, applied.loss(model, BATCH[:200]))  # another size is planned so, too
        assert applied.plan.predicted_peak_bytes <= budget_bytes


def test_a_hook_may_look_at_what_is_saved_again() -> None:
    torch.manual_seed(0)
    model = Net()
    plain, _ = step(loss_of, model, twice)
    with tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full") as applied:
        planned, peak_bytes = step(applied.loss, model, with_a_look_at_what_is_saved)
        assert all(map(torch.equal, plain, planned))
        # What it looks at is made again, and what that is made of.
        assert peak_bytes <= applied.plan.predicted_peak_bytes + 12 * BATCH.nbytes


def test_every_plan_of_a_step_that_keeps_its_graph_is_predicted_to_the_byte() -> None:
    torch.manual_seed(0)
    model = Net()
    plain, _ = step(loss_of, model, twice)
    kept = tightfit.Step(loss=loss_of, retain_graph=True)
    profile = profile_of(keeps_graph=True)
    assert profile.keeps_graph
    for plan in tightfit.frontier(profile, points=6):
        with tightfit.apply(model, plan, step=kept) as applied:
            step(applied.loss, model, twice)  # checks its replay
            planned, peak_bytes = step(applied.loss, model, twice)
        assert all(map(torch.equal, plain, planned))
        assert abs(peak_bytes - plan.predicted_peak_bytes) <= 64


def test_an_applied_plan_that_does_not_know_says_so_once() -> None:
    torch.manual_seed(0)
    model = Net()
    profile = profile_of(keeps_graph=False)
    plan = tightfit.frontier(profile, points=3)[1]
    with tightfit.apply(model, plan) as applied:
        with applied.step(BATCH):
            loss = loss_of(model, BATCH)
        twice(model, loss)
        with pytest.warns(PromiseWarning, match="retain_graph=True"), applied.step(BATCH):
            loss = loss_of(model, BATCH)
        twice(model, loss)
        with applied.step(BATCH):
            loss_of(model, BATCH).backward()


def test_what_the_collector_finds_while_a_value_is_rebuilt_is_let_go_of_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph in a cycle dies in the midst of a replay, and with it handles of the tape that is replayed."""

    class BesideACycle(Block):
        def forward(self, x: Tensor) -> Tensor:
            beside: list[Any] = [F.gelu(self.norm(x))]
            beside.append(beside)
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(BesideACycle(), BesideACycle())
    plain, _ = step(loss_of, model, twice)
    found: list[int] = []
    execute = Replayer._execute

    def collecting(self: Replayer, *args: Any) -> Any:
        made = execute(self, *args)
        gc.collect()
        found.append(len(self._died))
        return made

    with tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full") as applied:
        monkeypatch.setattr(Replayer, "_execute", collecting)
        gc.disable()
        try:
            planned, _ = step(applied.loss, model, twice)
        finally:
            gc.enable()
    assert all(map(torch.equal, plain, planned))
    assert max(found) > 0
    assert found[-1] == 0
