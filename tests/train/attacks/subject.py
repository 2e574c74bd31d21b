"""The run that is attacked: BatchNorm, dropout, and samples and layers that draw from all generators."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 128


class Subject(nn.Module):
    """Small, but with all that a resume may forget."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.dropout = nn.Linear(4, WIDTH), nn.Dropout(0.3)
        self.norm: nn.Module = nn.BatchNorm1d(WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.down = nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        hidden = self.dropout(self.norm(self.up(inputs)))
        for block in self.blocks:
            hidden = block(hidden)
        if self.training:
            hidden = hidden * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        return {"loss": nn.functional.mse_loss(self.down(hidden), targets)}


class Samples(Sequence[tuple[Tensor, Tensor]]):
    """Augmented: each sample draws from all generators."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, number: Any) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4) * random.random() + float(np.random.rand())
        return torch.full((4,), float(number) / 48) + 0.1 * noise, torch.tensor([float(number % 7)])


class PlainSamples(Samples):
    """The same whoever asks for them."""

    def __getitem__(self, number: Any) -> tuple[Tensor, Tensor]:
        return torch.full((4,), float(number) / 48), torch.tensor([float(number % 7)])


class PlainSubject(Subject):
    """Without anything random, and without statistics of each process's part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.up(inputs))
        for block in self.blocks:
            hidden = block(hidden)
        return {"loss": nn.functional.mse_loss(self.down(hidden), targets)}


def model() -> nn.Module:
    return Subject()


def plain_model() -> nn.Module:
    return PlainSubject()


def plain_data() -> Samples:
    return PlainSamples()


def data() -> Samples:
    return Samples()


def words(steps: int, save_every: int) -> list[str]:
    """The command, but for its folder."""
    here = __name__
    return ["train", "--model", f"{here}:model", "--dataset", f"{here}:data", "--batch-size", "8", "--log-every", "1",
            "--ema-decay", "0.9", "--clip-norm", "1.0", "--schedule", "cosine", "--steps", str(steps),
            "--save-every", str(save_every), "--resume", "auto"]  # fmt: skip


DATASET = f"{__name__}-data"
