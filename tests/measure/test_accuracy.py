"""What a fake run cannot show by itself: the predicted peak of the plain step is the measured one, to a few bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recollect
from recollect import meter
from recollect._torch_private import profiler_memory_events
from recollect.measure import costs, profiler
from recollect.profile_index import ProfileIndex
from recollect.records import EventKind
from recollect.simulate import simulate

SIDE = 128
#: Zero-dimensional tensors that autograd makes of Python numbers, of which no dispatcher tells.
NUMBERS_BYTES = 64


class OwnSum(torch.autograd.Function):
    """A node whose own backward adds two tensors that nobody else refers to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.add(gradient * 1.0, gradient * 2.0)


class Fan(nn.Module):
    """Uses one value several times, so that its gradients are added up."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIDE, SIDE))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.weight).sum()


@pytest.fixture(autouse=True)
def _cheap_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not matter here, only bytes."""
    monkeypatch.setattr(profiler, "measure_overhead", lambda: (0.001, 0.001))
    monkeypatch.setattr(costs, "_time_ms", lambda *_, **__: 0.01)


def allocated_in_backward(model: nn.Module, batch: Any, **options: Any) -> tuple[int, int]:
    """All bytes that the plain step's backward ever takes, predicted and measured."""
    profile = recollect.measure(model, batch, **options)
    begin = ProfileIndex(profile).backward_event()
    predicted = sum(profile.storages[e.a].nbytes for e in profile.events[begin:] if e.kind == EventKind.ALLOC)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = model(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss.backward()
    return predicted, sum(nbytes for _, nbytes in profiler_memory_events(profiled) if nbytes > 0)


def plain_peaks(model: nn.Module, batch: Any, **options: Any) -> tuple[int, int]:
    """The plain step's peak, predicted and measured."""
    profile = recollect.measure(model, batch, **options)
    predicted = simulate(ProfileIndex(profile), [None] * len(profile.regions)).peak_bytes
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = options.get("loss", lambda m, b: m(b))
    _, measured = meter.measure_peak(lambda: loss(model, batch).backward(), meter.resident_bytes(model, batch))
    return predicted, measured


FANS: dict[str, Callable[[Tensor], Tensor]] = {
    "fresh gradients": lambda h: h * 2 + h * 3 + h * 4,
    "many": lambda h: sum(h * n for n in range(2, 9)),
    "a gradient that two nodes get": lambda h: h + h * 2,
    "the same value twice": lambda h: (h + h) * 2,
    "a view as the first gradient": lambda h: h.view(-1) * 2 + (h * 3).view(-1),
    "a view as the second gradient": lambda h: (h * 3).view(-1) + h.view(-1) * 2,
    "an expanded first gradient": lambda h: (h * 2).sum() + h.sum(0).sum(),
    "an expanded second gradient": lambda h: h.sum(0).sum() + (h * 2).sum(),
    "a transposed gradient": lambda h: (h.t() @ h) * 2 + h * 3,
    "parts": lambda h: torch.cat([h[: SIDE // 2] * 2, h[SIDE // 2 :] * 3]) + h * 4,
    "a node that adds": lambda h: OwnSum.apply(h) + OwnSum.apply(h * 2),
    "broadcast": lambda h: h * h[0] + h[1],
}


@pytest.mark.parametrize("name", FANS)
def test_gradients_are_added_in_place_where_autograd_does(name: str) -> None:
    predicted, measured = allocated_in_backward(Fan(FANS[name]), torch.randn(SIDE, SIDE))
    assert abs(predicted - measured) <= NUMBERS_BYTES


def test_a_backward_inside_forward_adds_in_place_too() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        model(batch).backward()
        return (batch[0] * model.weight[0]).sum()

    predicted, measured = plain_peaks(Fan(lambda h: h * 2 + h * 3 + h * 4), torch.randn(SIDE, SIDE), loss=loss)
    assert abs(predicted - measured) <= NUMBERS_BYTES
