"""Measuring, fitting and verifying leave everything reachable as it was, bit for bit, also when they fail midway."""

from __future__ import annotations

import ctypes
import functools
import gc
import random
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

import tightfit
from tightfit import UnsupportedInput
from tightfit._torch_private import FakeTensor
from tightfit.profiling import measure as profiler
from tightfit.replay.session import Installed
from tightfit.step.host_copy import CopyFile, HostCopy, difference, same_contents
from tightfit.step.snapshot import RandomState, TrainingState
from tightfit.step.step import Step
from tightfit.verification.trial import Trial

Tensor = torch.Tensor
WIDTH = 8


# ---------------------------------------------------------------------------------------- an independent snapshot


def frozen(thing: Any, seen: set[int] | None = None) -> Any:
    """Everything reachable from `thing`, as nested tuples that compare by value and by identity."""
    seen = set() if seen is None else seen
    if thing is None or isinstance(thing, int | float | str | bytes | type | torch.dtype | torch.device):
        return thing
    if id(thing) in seen:
        return ("seen", id(thing))
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return frozen_tensor(thing, seen)
    if isinstance(thing, dict):
        return (id(thing), [(frozen(k, seen), frozen(v, seen)) for k, v in thing.items()])
    if isinstance(thing, list | tuple | deque):
        return (id(thing), [frozen(part, seen) for part in thing])
    if isinstance(thing, set):
        return (id(thing), sorted(map(repr, thing)))
    if isinstance(thing, np.ndarray):
        return (id(thing), thing.tobytes())
    if isinstance(thing, torch.Generator):
        return (id(thing), thing.get_state().tolist())
    if isinstance(thing, random.Random):
        return (id(thing), thing.getstate())
    if isinstance(thing, types.FunctionType):
        return (id(thing), [id(cell.cell_contents) for cell in thing.__closure__ or ()])
    if hasattr(thing, "__dict__"):
        return (id(thing), frozen(vars(thing), seen))
    return id(thing)


def frozen_tensor(tensor: Tensor, seen: set[int]) -> Any:
    data = tensor.detach()
    return (
        id(tensor), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor._version,
        data.contiguous().view(torch.uint8).numpy().tobytes() if data.ndim else data.item(),
        tensor.requires_grad, frozen(tensor.grad, seen) if tensor.is_leaf else None,
        frozen(vars(tensor), seen), frozen(tensor._backward_hooks, seen),
        frozen(tensor._post_accumulate_grad_hooks, seen),
    )  # fmt: skip


def changes(before: Any, after: Any, path: str = "") -> list[str]:
    """Where two snapshots differ."""
    if type(before) is type(after) and isinstance(before, list | tuple) and len(before) == len(after):
        return [c for i, (x, y) in enumerate(zip(before, after, strict=True)) for c in changes(x, y, f"{path}.{i}")]
    return [] if before == after else [f"{path}: {before!r:.200} is now {after!r:.200}"]


_others: list[Any] = []
"""Fake tensors of tests that ran before, whose tracebacks pytest keeps if they fail."""


@pytest.fixture(autouse=True)
def _only_own_fakes() -> Iterator[None]:
    _others.extend(fakes())
    yield
    _others.clear()


def fakes() -> list[Any]:
    """The fake tensors that were made in this test and are still alive."""
    gc.collect()
    before = {id(thing) for thing in _others}
    return [thing for thing in gc.get_objects() if type(thing) is FakeTensor and id(thing) not in before]


@pytest.fixture
def harmless() -> Iterator[Callable[..., None]]:
    """Call it with everything that must not change; it is compared when the test ends."""
    roots: list[Any] = []
    before: list[Any] = []

    def watch(*things: Any) -> None:
        roots.extend(things)
        before.extend([frozen(roots), RandomState()])

    yield watch
    assert roots
    assert changes(before[0], frozen(roots)) == []
    assert before[1].equals(RandomState())
    assert fakes() == []


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


# ------------------------------------------------------------------------------------------------ lazily cached tensors

TABLES: dict[int, Any] = {}
LISTED: list[Tensor] = []
GLOBAL: Tensor | None = None
HOLDER = types.SimpleNamespace(table=None)


@functools.lru_cache
def cached_positions(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)


class OfClass:
    table: Tensor | None = None


def make_closure() -> Callable[[], Tensor]:
    table: Tensor | None = None

    def positions() -> Tensor:
        nonlocal table
        if table is None:
            table = torch.arange(float(WIDTH))
        return table

    return positions


IN_CLOSURE = make_closure()


def default_argument(cache: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006  # the trap that is tested
    return cache.setdefault(WIDTH, torch.arange(float(WIDTH)))


class Lazy(nn.Module):
    """Makes a table at its first call and keeps it in some place."""

    shared: Tensor | None = None

    def __init__(self, place: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.place = place
        self.attribute: Tensor | None = None
        self.dictionary: dict[int, Tensor] = {}
        self.register_buffer("buffer", None)

    def table(self) -> Tensor:
        global GLOBAL
        new = torch.arange(float(WIDTH))
        match self.place:
            case "attribute":
                self.attribute = new if self.attribute is None else self.attribute
                return self.attribute
            case "dictionary":
                return self.dictionary.setdefault(WIDTH, new)
            case "buffer":
                self.buffer = new if self.buffer is None else self.buffer
                return self.buffer
            case "lru_cache":
                return cached_positions(WIDTH)
            case "global dictionary":
                return TABLES.setdefault(WIDTH, (new, [new]))[0]
            case "global list":
                LISTED.append(new)
                return LISTED[0]
            case "global variable":
                GLOBAL = new if GLOBAL is None else GLOBAL
                return GLOBAL
            case "global object":
                HOLDER.table = new if HOLDER.table is None else HOLDER.table
                return HOLDER.table
            case "closure":
                return IN_CLOSURE()
            case "class attribute":
                type(self).shared = new if self.shared is None else self.shared
                return type(self).shared
            case "attribute of another class":
                OfClass.table = new if OfClass.table is None else OfClass.table
                return OfClass.table
            case "default argument":
                return default_argument()
        raise AssertionError(self.place)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.table()).sum()


PLACES = [
    "attribute", "dictionary", "buffer", "lru_cache", "global dictionary", "global list", "global variable",
    "global object", "closure", "class attribute", "attribute of another class", "default argument",
]  # fmt: skip


@pytest.fixture
def _empty_places() -> None:
    global GLOBAL, IN_CLOSURE
    TABLES.clear()
    LISTED.clear()
    cached_positions.cache_clear()
    GLOBAL = HOLDER.table = Lazy.shared = OfClass.table = None
    IN_CLOSURE = make_closure()
    default_argument.__defaults__[0].clear()  # type: ignore[index]  # has defaults


@pytest.mark.usefixtures("_empty_places")
@pytest.mark.parametrize("place", PLACES)
def test_a_lazily_cached_tensor_is_never_left_fake(place: str, harmless: Callable[..., None]) -> None:
    model = Lazy(place)
    batch = torch.randn(2, WIDTH)
    harmless(
        model, batch, TABLES, LISTED, vars(HOLDER), vars(OfClass).get("table"), GLOBAL, vars(Lazy).get("shared"),
        IN_CLOSURE, default_argument.__defaults__,
    )  # fmt: skip
    profile = tightfit.measure(model, batch)
    assert profile.method == "fake"
    assert (GLOBAL, Lazy.shared, OfClass.table, HOLDER.table) == (None,) * 4
    assert cached_positions.cache_info().currsize == 0


@pytest.mark.usefixtures("_empty_places")
@pytest.mark.parametrize("place", ["buffer", "lru_cache", "global list", "closure", "class attribute"])
def test_a_step_after_fit_runs_on_real_tensors(place: str) -> None:
    model = Lazy(place)
    batch = torch.randn(2, WIDTH)
    with tightfit.fit(model, batch, budget="1GiB", grad_checkpoint="full") as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok is True
        loss = applied.loss(model, batch)
        loss.backward()
    assert type(loss) is Tensor
    assert type(model.linear.weight.grad) is Tensor
    assert fakes() == []
    del loss
    tightfit.measure(model, batch)  # now with a real tensor in the place
    assert type(model.table()) is Tensor


@pytest.mark.usefixtures("_empty_places")
def test_a_fake_tensor_whose_place_cannot_be_emptied_is_an_error_that_names_it() -> None:
    class Hidden:
        __slots__ = ("table",)

    hidden = Hidden()

    class Sly(Lazy):
        def forward(self, x: Tensor) -> Tensor:
            hidden.table = torch.arange(float(WIDTH))
            return (self.linear(x) * hidden.table).sum()

    with pytest.raises(UnsupportedInput, match="Hidden"):
        tightfit.measure(Sly("attribute"), torch.randn(2, WIDTH))
    del hidden.table
    assert fakes() == []


# ------------------------------------------------------------------------------------------------ the copies themselves


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(300, 7),
        torch.randn(300, 7).t(),
        torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last),
        torch.randn(400, 8)[:, ::2],
        torch.randn(1000).to(torch.bfloat16),
        torch.randn(600, dtype=torch.complex64),
        torch.randn(600, dtype=torch.complex64).conj(),
        torch.arange(1000).bool(),
        torch.full((1000,), float("nan")),
        torch.zeros(1000).neg(),
        torch.randn(1, 300).expand(5, 300),
        torch.randn(()),
        torch.zeros(0, 5),
        torch.eye(40).to_sparse(),
    ],
    ids=lambda t: f"{t.dtype}{list(t.shape)}",
)
def test_copies_are_exact(tensor: Tensor) -> None:
    file = CopyFile()
    original = (
        tensor.clone()
        if tensor.layout is not torch.strided
        else tensor.detach().as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    )
    first, second = HostCopy(original, file), HostCopy(original, file)
    assert same_contents(first, second)
    loaded = first.load()
    if tensor.layout is torch.strided and tensor.numel():
        changed = original if original.stride() and 0 in original.stride() else original.view_as(original)
        with torch.no_grad():
            target = changed[:1] if 0 in changed.stride() else changed
            target.copy_(torch.ones_like(target) * 3)
        assert not same_contents(first, HostCopy(original, file))
        assert difference(first, HostCopy(original, file)) > 0
    first.restore(original)
    assert same_contents(second, HostCopy(original, file))
    assert same_contents(second, HostCopy(loaded, file))


def test_a_copy_of_another_shape_or_type_is_not_the_same() -> None:
    file = CopyFile()
    a = HostCopy(torch.zeros(300), file)
    assert not same_contents(a, None)
    assert not same_contents(a, HostCopy(torch.zeros(3, 100), file))
    assert not same_contents(a, HostCopy(torch.zeros(300, dtype=torch.int32), file))
    assert difference(a, None) == difference(a, HostCopy(torch.zeros(299), file)) == float("inf")
    assert same_contents(HostCopy(torch.ones(30, 20), file), HostCopy(torch.ones(20, 30).t(), file))


def test_an_installed_plan_is_not_the_steps_doing() -> None:
    """`restore` neither takes a plan's forward away nor brings one back."""
    model = nn.Sequential(nn.Linear(4, 4))
    state = TrainingState(model, ())
    forward = Installed(recipes={})
    model.__dict__["forward"] = forward
    model.mark = 1  # type: ignore[assignment]  # set by hand
    state.restore()
    assert model.__dict__["forward"] is forward
    assert "mark" not in vars(model)


def test_an_interrupted_snapshot_leaves_the_model_as_it_was(harmless: Callable[..., None]) -> None:
    model = nn.Linear(4, 4)
    step = Step(optimizer=(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),))
    plan = tightfit.solve(tightfit.measure(model, torch.randn(2, 4), loss=lambda m, b: m(b).sum()), 2**30)
    batch = torch.randn(2, 4)
    applied = tightfit.apply(model, plan)
    harmless(model, step.optimizers, batch)

    class Interrupted(Trial):
        def _reach_steady_state(self) -> None:
            super()._reach_steady_state()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(model, batch, step).run_planned(applied)


def test_a_sparse_gradient_is_put_back() -> None:
    embedding = nn.Embedding(6, 3, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    before = gradient.to_dense()
    state = TrainingState(embedding, ())
    embedding(torch.tensor([2, 4])).sum().backward()
    assert not torch.equal(gradient.to_dense(), before)
    state.restore()
    assert embedding.weight.grad is gradient
    assert torch.equal(gradient.to_dense(), before)
    assert gradient._nnz() == 2


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
