"""Deep chains, for plans below one level of replay."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).pow(2).mean()  # type: ignore[no-any-return]  # calls of modules are not annotated


class RNN(nn.Module):
    """A loop in Python: all its steps are one region."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.turn, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for moment in x:
            state = torch.tanh(self.enter(moment) + self.turn(state))
        return self.head(state).pow(2).mean()  # type: ignore[no-any-return]  # calls of modules are not annotated
