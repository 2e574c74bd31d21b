"""Training that leaves what a plan promises is told once for each plan, with what to do; all else is silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss

import tightfit
from tests.support.chains import Residual
from tightfit import Budget
from tightfit.errors import PromiseWarning
from tightfit.solver.solver import plain_plan

Batch = tuple[torch.Tensor, torch.Tensor]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.Sequential(*(Residual(8) for _ in range(6))), nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))  # type: ignore[no-any-return]  # calls of modules are not annotated


def batch_of(size: int) -> Batch:
    return torch.randn(size, 8), torch.arange(size) % 16


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def other_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Saves much more than the planned one."""
    scores = model(batch[0])
    return nll_loss((scores.softmax(-1).log() + scores.exp().sqrt()).tanh(), batch[1])


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters())


BATCH = batch_of(128)
MODEL = Classifier()
UNCOUNTED = tightfit.measure(MODEL, BATCH, loss=loss_of, cost_cache=False)
COUNTED = tightfit.measure(MODEL, BATCH, loss=loss_of, optimizer=adamw(MODEL), cost_cache=False)


def planned(
    profile: tightfit.Profile, optimizer: Any = None, share: float = 0.6, beside_bytes: int = 0
) -> tuple[Classifier, tightfit.Applied]:
    """A model with a plan for a budget between the resident memory and the plain step's peak."""
    model = Classifier()
    plain_bytes = plain_plan(profile, 0).plain_peak_bytes
    budget_bytes = int(profile.baseline_bytes + share * (plain_bytes - profile.baseline_bytes))
    budget = Budget(total_bytes=budget_bytes + beside_bytes, beside_step_bytes=beside_bytes)
    own = optimizer(model) if optimizer is not None else None
    return model, tightfit.fit(model, BATCH, budget=budget, profile=profile, loss=loss_of, optimizer=own)


@contextmanager
def telling(*words: str) -> Iterator[None]:
    """Exactly these promises are told, in this order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(one.message) for one in caught if one.category is PromiseWarning]
    assert len(messages) == len(words), messages
    for message, word in zip(messages, words, strict=True):
        assert word in message
    assert all(one.filename == __file__ for one in caught if one.category is PromiseWarning)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    beside: Callable[[], object] = lambda: None,
) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, BATCH).backward()
        optimizer.step()
        beside()


def test_what_the_plan_holds_for_is_silent() -> None:
    model, applied = planned(COUNTED, adamw)
    assert applied.installed
    optimizer = adamw(model)  # another one of the same kind, as a resumed run has
    with telling():
        train(model, optimizer, applied.loss)
        train(model, optimizer, loss_of)
        with applied.step(BATCH):
            loss = loss_of(model, BATCH)
        loss.backward()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                loss_of(model, batch_of(50))
        model.eval()
        loss_of(model, batch_of(60))
        model.train()
        applied.loss(model, batch_of(40)).backward()
        with applied.paused():
            train(model, optimizer, other_loss)


def test_bare_calls_of_another_signature() -> None:
    model, applied = planned(UNCOUNTED)
    with telling("have no plan: float32[90x8]"):
        for size in (90, 91):
            loss_of(model, batch_of(size)).backward()
    assert applied.plans is not None
    assert applied.plans.statistics.unplanned_calls == 2


@pytest.mark.parametrize(
    "hooks",
    [
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ],
)
def test_hooks_around_the_loss(hooks: Callable[[], Any]) -> None:
    model, applied = planned(UNCOUNTED)
    with telling("saved-tensor hooks that are not tightfit's"):
        for _ in range(2):
            with hooks():
                loss = applied.loss(model, BATCH)
            loss.backward()


def test_warnings_that_are_errors_leave_nothing_half_done() -> None:
    model, applied = planned(UNCOUNTED)

    def hooked() -> None:
        with torch.autograd.graph.save_on_cpu():
            applied.loss(model, BATCH)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PromiseWarning):
            hooked()
    applied.statistics.reset()
    applied.loss(model, BATCH).backward()
    assert applied.statistics.replayed_ops > 0
    assert (applied.statistics.mismatches, applied.statistics.unplanned_calls) == (0, 0)


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_another_loss(share: float) -> None:
    """In a step that drops something, and in one that does not."""
    model, applied = planned(UNCOUNTED, share=share)
    assert applied.installed is (share < 1)
    with telling("more than the one that the plan was made for"):
        for _ in range(2):
            with applied.step(BATCH):
                loss = other_loss(model, BATCH)
            loss.backward()


def test_the_loss_of_a_bare_call_where_the_plan_recomputes_it() -> None:
    model, applied = planned(UNCOUNTED)
    resolved = applied.resolved
    resolved.__dict__["loss_bytes"] = applied.plan.budget_bytes
    with telling("of the loss, but the model was called outside"):
        loss_of(model, BATCH)
        loss_of(model, BATCH)
    with telling():
        applied.loss(model, BATCH)


def test_an_optimizer_that_no_plan_counts() -> None:
    model, applied = planned(UNCOUNTED)
    with telling():
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), applied.loss)  # it holds nothing
    with telling("AdamW holds "):
        train(model, adamw(model), applied.loss)
    applied.remove()
    _, applied = planned(UNCOUNTED, share=1.5)
    with telling():
        train(applied._model, adamw(applied._model), applied.loss)  # there is room


def test_a_second_model_trained_in_turn() -> None:
    second, third = Classifier(), Classifier()
    steps = [partial(train, model, adamw(model), loss_of) for model in (second, third)]
    for beside_bytes, told in ((1 << 20, ()), (0, ("AdamW trains parameters outside the planned model",))):
        model, applied = planned(COUNTED, adamw, beside_bytes=beside_bytes)
        (own,) = applied._steps[""].optimizers
        with telling(*told):
            for step in steps:
                train(model, own, applied.loss, beside=step)
        applied.remove()


def test_another_model_trained_before_or_after() -> None:
    """As in a search, or where a plain twin is compared."""
    with telling():
        for _ in range(3):
            model, applied = planned(COUNTED, adamw)  # never uninstalled
            train(model, applied._steps[""].optimizers[0], applied.loss)
            twin = Classifier()
            train(twin, adamw(twin), loss_of)


def test_a_block_by_itself_and_each_plan_anew() -> None:
    for _ in range(2):
        model, applied = planned(UNCOUNTED)
        with telling("'blocks.1' runs outside the model's planned forward"):
            for block in (model.blocks[1], model.blocks[2]):
                block(BATCH[0]).sum().backward()
        plan = replace(applied.plan, optimizer="")
        applied.remove()
    with tightfit.apply(model, plan), telling("'blocks.0' runs outside"):
        model.blocks[0](BATCH[0])
