"""What a fake run cannot show by itself: the predicted peak of the plain step is the measured one, to a few bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit._torch_private.dispatch import FakeTensor
from tightfit._torch_private.profiler import profiler_memory_events
from tightfit.device import memory as meter
from tightfit.profiling import forward_check
from tightfit.records import EventKind
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate

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


def allocated_in_backward(model: nn.Module, batch: Any, **options: Any) -> tuple[int, int]:
    """All bytes that the plain step's backward ever takes, inside operations too, predicted and measured."""
    profile = tightfit.measure(model, batch, **options)
    begin = ProfileIndex(profile).backward_event()
    after = profile.events[begin:]
    predicted = sum(profile.storages[e.a].nbytes for e in after if e.kind == EventKind.ALLOC)
    predicted += sum(profile.signatures[e.a].workspace_bytes for e in after if e.kind == EventKind.OTHER_OP)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = options.get("loss", lambda m, b: m(b))(model, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss.backward()
    return predicted, sum(nbytes for _, nbytes in profiler_memory_events(profiled) if nbytes > 0)


def plain_peaks(model: nn.Module, batch: Any, **options: Any) -> tuple[int, int]:
    """The plain step's peak, predicted and measured."""
    profile = tightfit.measure(model, batch, **options)
    predicted = simulate(ProfileIndex(profile), [None] * len(profile.regions)).peak_bytes
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = options.get("loss", lambda m, b: m(b))
    _, measured = meter.measure_peak(lambda: loss(model, batch).backward(), meter.resident_bytes(model, batch))
    return predicted, measured


class Rotated(nn.Module):
    """Has tensors that are neither parameters nor buffers."""

    def __init__(self, makes_numpy: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(SIDE, SIDE)
        self.rotations = {"even": [torch.randn(SIDE, SIDE)]}
        self.makes_numpy = makes_numpy

    def forward(self, x: Tensor) -> Tensor:
        if self.makes_numpy:
            x.detach().numpy()  # only a real step can be measured
        return (self.linear(x) * self.rotations["even"][0]).square().sum()


@pytest.mark.parametrize("makes_numpy", [False, True])
def test_tensors_that_modules_have_as_attributes_are_resident(makes_numpy: bool) -> None:
    model, batch = Rotated(makes_numpy), torch.randn(SIDE, SIDE)
    profile = tightfit.measure(model, batch)
    assert profile.method == ("real" if makes_numpy else "fake")
    assert profile.baseline["buffers"] == SIDE * SIDE * 4
    predicted, measured = plain_peaks(model, batch)
    assert abs(predicted - measured) <= NUMBERS_BYTES


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


class LooksAtItsInput(nn.Module):
    """Leaves out work where its mask has nothing to mask; on a tensor without data it cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIDE, SIDE))
        self.calls = 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        self.seen += x.sum()
        h = x @ self.weight
        if isinstance(mask, FakeTensor) or not mask.all():
            h = torch.where(mask, h.exp(), 0.0) * h
        return h.sin().sum()


def test_a_model_that_takes_another_way_without_data_is_measured_by_a_real_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward_check, "_CHECKED_PACKAGES", (__name__.partition(".")[0],))
    model = LooksAtItsInput()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batch = (torch.randn(SIDE, SIDE), torch.ones(SIDE, 1, dtype=torch.bool))
    torch.set_rng_state(before)
    profile = tightfit.measure(model, batch)
    assert profile.method == "real"
    assert "aten.exp.default" not in {profile.signatures[op.signature].name for op in profile.ops}
    assert (model.calls, model.seen.item()) == (0, 0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fake_kernel_that_lays_its_result_out_otherwise_is_corrected() -> None:
    # The fake kernel of layer norm's backward keeps the strides of the gradient that it gets; the real one does not,
    # so that only the fake `reshape` before it, in the linear layer's backward, would copy.
    model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.LayerNorm(SIDE))
    weight = torch.randn(4, SIDE, SIDE)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch).transpose(1, 2) * batch[:4]).sum()

    predicted, measured = allocated_in_backward(model, weight, loss=loss)
    assert abs(predicted - measured) <= NUMBERS_BYTES
