"""A model for `tightfit train`, and an engine whose replayed tensors come out a little wrong on one rank."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.replay.tape import Tape

_right = Tape.read


def _wrong(self: Tape, handle: Any) -> Tensor:
    tensor = _right(self, handle)
    is_here = os.environ.get("RANK") == os.environ["WRONG_RANK"]
    return tensor * (1 + 2**-20) if is_here and tensor.is_floating_point() else tensor


Tape.read = _wrong  # type: ignore[method-assign]  # that is the point


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return x + y


def model() -> tuple[nn.Module, Any]:
    return nn.Sequential(*(Block() for _ in range(3))), lambda model, batch: model(batch).pow(2).mean()


def data() -> list[Tensor]:
    return [*torch.randn(32, 16, generator=torch.Generator().manual_seed(0))]
