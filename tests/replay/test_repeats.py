"""Calls that are not known to give the same bits twice: repeated, trusted by their kind, or barred for the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.replay.helpers import PATH
from tightfit.device.cpu import CpuDevice
from tightfit.operators import facts
from tightfit.replay.installed import Installed

REPETITIONS = 8
BARRED = "other bits"


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    library = torch.library.Library("aten", "FRAGMENT")
    yield library
    library._destroy()
    for number in [number for number, info in facts._INFO.items() if "tightfit_" in info.name]:
        del facts._INFO[number]


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A processor whose kernels add atomically; how often it was kept busy beside a repeated call."""
    times: list[None] = []

    def busy_beside(device: CpuDevice) -> AbstractContextManager[None]:
        times.append(None)
        return nullcontext()

    monkeypatch.setattr(CpuDevice, "adds_atomically", True)
    monkeypatch.setattr(CpuDevice, "repetitions", REPETITIONS)
    monkeypatch.setattr(CpuDevice, "busy_beside", busy_beside)
    return times


def operator(
    library: torch.library.Library, name: str, kernel: Callable[..., Any], schema: str = "(Tensor x) -> Tensor"
) -> Any:
    library.define(f"tightfit_{name}{schema}")
    library.impl(f"tightfit_{name}", kernel, "CPU")
    return getattr(torch.ops.aten, f"tightfit_{name}")


def forward(installed: Installed, function: Any, leaf: Tensor) -> None:
    """A step in whose region autograd saves what the operator makes."""
    with installed.region(PATH):
        loss = (function(leaf.detach()) * leaf).sum()
    loss.backward()


def test_a_kind_of_call_is_repeated_until_it_is_trusted(library: torch.library.Library, busy: list[None]) -> None:
    calls: list[None] = []
    sine = operator(library, "sine", lambda x: (calls.append(None), x.sin())[1])
    installed = Installed(recipes={})
    forward(installed, sine, torch.randn(4, requires_grad=True))
    assert len(calls) == 1 + REPETITIONS + 1  # forward, repeated, replayed
    assert len(busy) == REPETITIONS // 2
    calls.clear()
    forward(installed, sine, torch.randn(4, requires_grad=True))
    assert len(calls) == 2
    calls.clear()
    forward(installed, sine, torch.randn(5, requires_grad=True))  # by its shape it may have another kernel
    assert len(calls) == 1 + REPETITIONS + 1


@pytest.mark.usefixtures("busy")
def test_a_call_that_once_differed_is_barred_for_the_process(library: torch.library.Library) -> None:
    calls: list[None] = []

    def kernel(x: Tensor) -> Tensor:
        calls.append(None)
        return x.sin() + (len(calls) == 7)

    unsteady = operator(library, "unsteady", kernel)
    leaf = torch.randn(4, requires_grad=True)
    first = Installed(recipes={})
    forward(first, unsteady, leaf)
    assert (len(calls), first.statistics.refused_ops, first.statistics.replayed_ops) == (7, 1, 0)
    other = Installed(recipes={})
    forward(other, unsteady, leaf)
    assert (len(calls), other.statistics.refused_ops, other.statistics.replayed_ops) == (8, 0, 0)
    assert other.statistics.dropped_slots == 0


@pytest.mark.usefixtures("busy")
def test_a_lack_of_memory_says_nothing_about_a_call(library: torch.library.Library) -> None:
    calls: list[None] = []

    def kernel(x: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return x.sin()

    large = operator(library, "large", kernel)
    leaf = torch.randn(4, requires_grad=True)
    first = Installed(recipes={})
    forward(first, large, leaf)
    assert (first.statistics.refused_ops, first.statistics.replayed_ops) == (1, 0)
    other = Installed(recipes={})
    forward(other, large, leaf)
    assert (other.statistics.refused_ops, other.statistics.replayed_ops) == (0, 1)


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_seeds_that_nothing_reads_need_not_be_equal(
    dropout: float, library: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in attention by cuDNN, which leaves them uninitialised where it drops nothing."""
    seeds: list[int] = []

    def kernel(x: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
        seeds.append(len(seeds))
        return x.sin(), torch.tensor(seeds[-1])

    attention = operator(library, "attention", kernel, "(Tensor x, float dropout_p=0.) -> (Tensor, Tensor)")
    monkeypatch.setitem(facts._UNDEFINED_WITHOUT_DROPOUT, "aten.tightfit_attention.default", (1,))
    installed = Installed(recipes={})
    forward(installed, lambda x: attention(x, dropout)[0], torch.randn(4, requires_grad=True))
    assert installed.statistics.replayed_ops == (1 if dropout == 0 else 0)


def test_the_seeds_of_attention_by_cudnn_are_undefined_without_dropout() -> None:
    info = facts.describe(torch.ops.aten._scaled_dot_product_cudnn_attention.default)
    names = [result.name for result in info.func._schema.returns]
    for args, kwargs, undefined in (
        ((None,) * 5, {}, ["philox_seed", "philox_offset"]),
        ((None,) * 5, {"dropout_p": 0.0}, ["philox_seed", "philox_offset"]),
        ((None,) * 5 + (0.1,), {}, []),
        ((None,) * 5, {"dropout_p": 0.1}, []),
    ):
        assert [names[place] for place in facts.undefined_results(info, args, kwargs)] == undefined
    assert info.needs_self_check


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_convolutions_are_repeated_where_kernels_add_atomically(transposed: bool) -> None:
    layer = (torch.nn.ConvTranspose1d if transposed else torch.nn.Conv1d)(2, 2, 3)
    installed = Installed(recipes={})
    with installed.region(PATH):
        loss = layer(torch.randn(1, 2, 8)).sin().sum()
    assert bool(installed.repeats.trusted) == transposed
    loss.backward()
    assert installed.statistics.replayed_ops == 2  # its input is random, and was dropped, too
