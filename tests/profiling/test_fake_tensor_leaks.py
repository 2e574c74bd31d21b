"""A model that caches tensors lazily keeps none that measuring made without data."""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit import UnsupportedInput

Tensor = torch.Tensor
WIDTH = 8

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


@pytest.fixture(autouse=True)
def _nothing_frozen() -> Iterator[None]:
    """As in a process that never calls `gc.freeze`, which all other tests have called for them."""
    gc.unfreeze()
    yield
    gc.freeze()


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
@pytest.mark.parametrize("place", ["lru_cache", "global list", "global object", "closure"])
def test_neither_in_what_was_frozen_before(place: str, fakes: Callable[[], list[Any]]) -> None:
    model = Lazy(place)
    gc.freeze()  # as servers do that fork, and trainers that keep the collector from walking over their model
    assert tightfit.measure(model, torch.randn(2, WIDTH)).method == "fake"
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
    assert fakes() == []


@pytest.mark.usefixtures("_empty_places")
@pytest.mark.parametrize("place", ["buffer", "closure"])
def test_a_step_after_fit_runs_on_real_tensors(place: str, fakes: Callable[[], list[Any]]) -> None:
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
def test_a_fake_tensor_whose_place_cannot_be_emptied_is_an_error_that_names_it(
    fakes: Callable[[], list[Any]],
) -> None:
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
