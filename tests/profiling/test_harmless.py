"""Measuring, fitting and verifying leave everything reachable as it was, bit for bit, also when they fail midway."""

from __future__ import annotations

import ctypes
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

import tightfit
from tightfit import UnsupportedInput
from tightfit._torch_private.dispatch import FakeTensor
from tightfit.profiling import measure as profiler
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step
from tightfit.verification.trial import Trial

Tensor = torch.Tensor
WIDTH = 8


# ------------------------------------------------------------------------------------------------ models


class Busy(nn.Module):
    """Changes, in its forward, about everything that a forward can reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1)) for _ in "ab")
        self.layers[1].eval()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(WIDTH))
        self.register_buffer("repeated", torch.zeros(1, WIDTH).expand(4, WIDTH))
        self.register_buffer("lazy", None)
        self.calls = 0
        self.history: list[Any] = [[]]
        self.notes = SimpleNotes()
        self.recent: deque[int] = deque(maxlen=2)
        self.counter: Counter[str] = Counter()
        self.ordered: OrderedDict[str, int] = OrderedDict(a=1)
        self.cache: dict[Any, Any] = {"nested": {}}
        self.statistics = np.zeros(WIDTH)
        self.generator = torch.Generator().manual_seed(3)
        self.python_random = random.Random(4)
        self.state_of_last = torch.zeros(WIDTH)
        self.embed.weight.note = ["mine"]  # type: ignore[attr-defined]  # set by hand

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.history[0].append(self.calls)
        self.notes.seen.append(self.calls)
        self.notes.last = self.calls
        self.recent.append(self.calls)
        self.counter["calls"] += 1
        self.ordered["a"] = self.calls
        self.ordered[f"call {self.calls}"] = 0
        self.cache["nested"][self.calls] = torch.arange(float(WIDTH))
        self.statistics += 1
        if self.lazy is None:
            self.lazy = torch.ones(WIDTH)
        with torch.no_grad():
            self.state_of_last += 1
            self.frozen.weight.mul_(0.5)
            self.frozen.weight.data = self.frozen.weight.data.clone()
        self.frozen.requires_grad_(True)
        self.embed.weight.note.append("yours")  # type: ignore[attr-defined]  # set by hand
        self.head.weight.register_hook(lambda gradient: gradient)
        self.register_forward_hook(lambda *_: None)
        self.layers[0].train(not self.layers[0].training)
        x = self.norm((self.embed(tokens) * self.lazy).transpose(1, 2)).transpose(1, 2)
        noise = torch.rand(WIDTH, generator=self.generator) * self.python_random.random()
        self.count += 1
        for layer in self.layers:
            x = layer(x) + self.frozen(x) * noise
        return self.head(x * random.random() * float(np.random.rand()))


class SimpleNotes:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.last = 0


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


TOKENS = torch.randint(0, 10, (4, 6), generator=torch.Generator().manual_seed(0))


def used(model: Busy, steps: int = 1) -> torch.optim.Optimizer:
    """An optimizer that has taken steps, under a scheduler."""
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(steps):
        loss_of(model, TOKENS).backward()
        optimizer.step()
        scheduler.step()
        model.head.weight.grad = None
    return optimizer


VERBS: dict[str, Callable[..., Any]] = {
    "measure": lambda model, *rest, **options: tightfit.measure(model, *rest, **options),
    "measure for real": lambda model, batch, loss, optimizer: profiler.measure_step(
        model, batch, Step(loss=loss, optimizer=(optimizer,)), concrete=True
    ),
    "fit": lambda *rest, **options: tightfit.fit(*rest, **options, budget="1GiB", grad_checkpoint="full").remove(),
}


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "in training"])
@pytest.mark.parametrize("verb", VERBS)
def test_everything_reachable_is_as_it_was(verb: str, steps: int, harmless: Callable[..., None]) -> None:
    model = Busy()
    optimizer = used(model, steps)
    harmless(model, optimizer, TOKENS)
    VERBS[verb](model, TOKENS, loss=loss_of, optimizer=optimizer)


class Trouble(Exception):
    pass


def failing(where: str, error: BaseException, fake_too: bool) -> Callable[..., Tensor]:
    def trigger(tensor: Any) -> None:
        if fake_too or type(tensor) is not FakeTensor:
            raise error

    def loss(model: Any, tokens: Tensor) -> Tensor:
        if where == "forward":
            handle = model.layers[1].register_forward_hook(lambda module, inputs, output: trigger(output))
            try:
                return loss_of(model, tokens)
            finally:
                handle.remove()
        result = loss_of(model, tokens)
        if where == "loss":
            trigger(result)
        elif where == "backward":
            result.register_hook(trigger)
        return result

    return loss


@pytest.mark.parametrize(
    ("where", "error", "fake_too"),
    [
        ("forward", Trouble("no"), True),
        ("forward", KeyboardInterrupt(), True),
        ("forward", RuntimeError("no"), False),
        ("loss", KeyboardInterrupt(), False),
        ("backward", KeyboardInterrupt(), True),
        ("backward", Trouble("no"), False),
    ],
    ids=str,
)
def test_also_when_the_step_fails(
    where: str, error: BaseException, fake_too: bool, harmless: Callable[..., None]
) -> None:
    model = Busy()
    optimizer = used(model)
    harmless(model, optimizer, TOKENS)
    with pytest.raises(type(error)) as caught:
        VERBS["fit"](model, TOKENS, loss=failing(where, error, fake_too), optimizer=optimizer)
    caught.value.__traceback__ = None
    del caught


def test_also_when_the_optimizer_fails(harmless: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Busy()
    optimizer = torch.optim.AdamW(model.parameters())
    profile = tightfit.measure(model, TOKENS, loss=loss_of, optimizer=optimizer)
    plan = tightfit.solve(profile, 2**30)
    harmless(model, optimizer, TOKENS)
    right = torch.optim.AdamW.step

    def interrupted(self: Any, *rest: Any) -> Any:
        right(self, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tightfit.verify(model, TOKENS, plan, loss=loss_of, optimizer=optimizer)


def test_a_batch_that_the_loss_takes_apart_is_whole_again(harmless: Callable[..., None]) -> None:
    model = nn.Linear(4, 4)
    batch = {"x": torch.randn(2, 4), "y": torch.randn(2, 4)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        target = batch.pop("y")
        batch["x"].mul_(2)
        return (model(batch["x"]) - target).pow(2).sum()

    harmless(model, batch)
    with tightfit.fit(model, batch, budget="1GiB", loss=loss, grad_checkpoint="full") as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok is True


def test_a_loss_that_reaches_past_its_arguments(harmless: Callable[..., None]) -> None:
    model = Busy()
    optimizer = used(model)
    harmless(model, optimizer, TOKENS)

    def loss(copied: nn.Module, tokens: Tensor) -> Tensor:
        model.lazy = copied(tokens).sum()  # type: ignore[assignment]  # set by hand
        return loss_of(model, TOKENS)

    tightfit.measure(model, TOKENS, loss=loss, optimizer=optimizer)


def test_a_loss_that_changes_the_users_tensors_in_a_fake_run_is_an_error() -> None:
    model = nn.Linear(4, 1)

    def loss(copied: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad(), disable_current_modes():
            model.bias.add_(1)
        return copied(x).sum()

    with pytest.raises(UnsupportedInput, match="was changed while a copy"):
        tightfit.measure(model, torch.randn(2, 4), loss=loss)


def test_a_backward_that_was_pending_still_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    batch = torch.randn(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pending = model(batch).sum()
    tightfit.fit(model, batch, loss=lambda m, b: m(b).sum(), optimizer=optimizer, budget="1GiB").remove()
    pending.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(batch).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True) if p.grad is not None)


def test_an_interrupted_snapshot_leaves_the_model_as_it_was(harmless: Callable[..., None]) -> None:
    model = nn.Linear(4, 4)
    step = Step(optimizer=(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),))
    plan = tightfit.solve(tightfit.measure(model, torch.randn(2, 4), loss=lambda m, b: m(b).sum()), 2**30)
    batch = torch.randn(2, 4)
    applied = tightfit.apply(model, plan)
    harmless(model, step.optimizers, batch)

    class Interrupted(Trial):
        def _reach_steady_state(self, given: TrainingState) -> TrainingState:
            super()._reach_steady_state(given)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(model, batch, step).run_planned(applied)


class OfCtypes(ctypes.Structure):
    """Its class keeps its attributes in no plain dictionary (on Python 3.11), as do those of any library in C."""

    _fields_ = [("number", ctypes.c_int)]


def test_classes_of_ctypes_beside_the_model_are_no_obstacle() -> None:
    model = nn.Linear(4, 4)
    before = dict(vars(OfCtypes))
    with tightfit.fit(model, torch.ones(2, 4), loss=lambda m, b: m(b).sum()) as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok is True
    assert dict(vars(OfCtypes)) == before
