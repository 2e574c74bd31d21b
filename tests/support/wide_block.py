"""The layers of a block that widens what it gets, and narrows it again; how it runs them, a subclass says."""

from __future__ import annotations

from torch import nn

#: Of what goes from block to block.
WIDTH = 32


class WideBlock(nn.Module):
    """A norm, and two linear layers between which activations are four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)
