"""Switches of the libraries behind kernels that are set around forward only: a replay runs under its forward's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit._torch_private.libraries import library_switches, switched

# PyTorch's own context for oneDNN says so.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")

BATCH = torch.randn(4, 8, 24, 24, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, around: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.around = around
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU()) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            with self.around():
                x = x + layer(x)
        return x


def without_onednn() -> AbstractContextManager[Any]:
    return torch.backends.mkldnn.flags(enabled=False)


@contextmanager
def flushing_denormals() -> Any:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def in_lower_precision() -> Any:
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


AROUND = [without_onednn, flushing_denormals, in_lower_precision]


def tiny(model: nn.Module, x: Tensor) -> Tensor:
    """With denormal numbers among the activations."""
    y: Tensor = model(x)
    return (y * 1e-38 * torch.rand_like(y)).mul(0.1).sum() + y.pow(2).mean()


@pytest.mark.parametrize("inside", [False, True], ids=["around the model", "around each layer"])
@pytest.mark.parametrize("around", AROUND)
def test_bits_and_proof(around: Callable[[], AbstractContextManager[Any]], inside: bool) -> None:
    before = library_switches()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        if inside:
            return tiny(model, x)
        with around():
            return tiny(model, x)

    torch.manual_seed(0)
    model = Net(around if inside else torch.enable_grad)
    with tightfit.fit(model, BATCH, loss=loss, grad_checkpoint="full") as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok, applied.verdict.differing
        applied.statistics.reset()
        applied.loss(model, BATCH).backward()
        assert applied.statistics.replayed_ops > 0
    assert library_switches() == before


@pytest.mark.parametrize("around", AROUND)
def test_switches_that_are_set_only_after_fit(around: Callable[[], AbstractContextManager[Any]]) -> None:
    torch.manual_seed(0)
    model = Net(torch.enable_grad)
    with tightfit.fit(model, BATCH, loss=tiny, grad_checkpoint="full") as applied:
        state = {name: value.clone() for name, value in model.state_dict().items()}

        def gradients(run: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
            model.load_state_dict(state)
            model.zero_grad()
            torch.manual_seed(5)
            with run(), around():
                loss = applied.loss(model, BATCH)
            loss.backward()
            return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

        assert all(map(torch.equal, gradients(applied.paused), gradients(torch.enable_grad)))


def test_every_switch_can_be_set_and_put_back() -> None:
    before = library_switches()
    other = tuple(not value if isinstance(value, bool) else "ieee" for value in before)
    with switched(other):
        assert library_switches() == other
    assert library_switches() == before
