"""One region that sets the peak is divided: no layer of it need be a region of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tightfit
from tightfit.device import memory as meter
from tightfit.step.model import give_gradients


class Extractor(nn.Module):
    """Convolutions over sound, as wav2vec2 begins: each layer of two operations leaves half as much as it gets."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.Sequential(
                nn.Conv1d(1 if place == 0 else 16, 16, 3, 2), nn.GroupNorm(4, 16) if place == 0 else nn.GELU()
            )
            for place in range(6)
        ]
        self.layers = nn.ModuleList(layers)
        self.is_checkpointed = False

    def forward(self, sound: Tensor) -> Tensor:
        x = sound[:, None]
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.is_checkpointed else layer(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.extractor, self.head = Extractor(), nn.Linear(16, 4)

    def forward(self, sound: Tensor) -> Tensor:
        return self.head(self.extractor(sound).transpose(1, 2))


def loss_of(model: nn.Module, sound: Tensor) -> Tensor:
    result: Tensor = model(sound)
    return result.pow(2).mean()


def peak_bytes(model: nn.Module, batch: Tensor, loss: Callable[..., Tensor]) -> int:
    give_gradients(model)
    return meter.measure_peak(lambda: loss(model, batch).backward(), meter.resident_bytes(model, batch))[1]


def test_a_feature_extractor_needs_no_more_than_with_each_layer_checkpointed() -> None:
    model, batch = Net(), torch.randn(2, 4000)
    plain_bytes = peak_bytes(model, batch, loss_of)
    model.extractor.is_checkpointed = True
    checkpoint_bytes = peak_bytes(model, batch, loss_of)
    model.extractor.is_checkpointed = False
    profile = tightfit.measure(model, batch, loss=loss_of)
    with pytest.raises(tightfit.BudgetInfeasible) as smallest:
        tightfit.solve(profile, 1)
    budget = smallest.value.required_bytes
    assert budget <= checkpoint_bytes < plain_bytes
    with tightfit.fit(
        model, batch, budget=budget, loss=loss_of, profile=profile, reference_budget_bytes=2**40
    ) as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert peak_bytes(model, batch, applied.loss) <= budget
