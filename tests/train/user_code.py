"""What a user's own module may hold: factories of models and datasets, good ones and bad ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def numbers(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    """A regression problem: the sum of four numbers."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 4, generator=generator)
    return [(row, row.sum().unsqueeze(0)) for row in inputs]


def ragged_data() -> list[Tensor]:
    return [torch.zeros(2), torch.zeros(3)]


def no_data() -> list[Tensor]:
    return []


def endless_data() -> Any:
    return iter(int, 1)


class OwnLoss(nn.Module):
    """Returns its loss, as many models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(inputs), targets)}


def own_loss_model(width: int = 8) -> nn.Module:
    return OwnLoss(width)


def model_and_loss(width: int = 8) -> tuple[nn.Module, Any]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return (model(inputs) - targets).abs().mean()

    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)), loss


def vector_loss_model() -> tuple[nn.Module, Any]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return (model(inputs) - targets) ** 2

    return nn.Linear(4, 1), loss


def lossless_model() -> nn.Module:
    class Lossless(nn.Linear):
        def forward(self, inputs: Tensor, targets: Tensor) -> str:  # type: ignore[override]
            return "no loss"

    return Lossless(4, 1)


def frozen_model() -> nn.Module:
    return OwnLoss(8).requires_grad_(False)


def not_a_model() -> str:
    return "not a model"


NOT_CALLABLE = 3
