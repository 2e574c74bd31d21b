"""A recurrent model that predicts the next step of a series, or the next token of a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tightfit.errors import UnsupportedInput


@dataclass(frozen=True, kw_only=True)
class LstmConfig:
    """Sizes of an `Lstm`. Exactly one of `features` (series) and `vocabulary_size` (text) is above zero."""

    features: int = 0
    """Numbers per time step of a series."""
    vocabulary_size: int = 0
    """Token numbers of a text are below this."""
    width: int = 64
    """Size of the hidden state."""
    layers: int = 2
    """Number of recurrent layers."""
    dropout: float = 0.1
    """Probability of dropping, between layers and before the head."""
    steps_at_a_time: int = 0
    """Time steps per call of PyTorch's LSTM; 0: all, in one operation, whose memory cannot be split. With fewer, the
    state is passed on, and a plan may keep the memory of some calls and recompute that of others."""

    def __post_init__(self) -> None:
        if (self.features > 0) == (self.vocabulary_size > 0):
            raise UnsupportedInput(
                f"an lstm reads either a series or a text, but features={self.features} and "
                f"vocabulary_size={self.vocabulary_size} were given. Set exactly one of them above zero."
            )


class Lstm(nn.Module):
    """The next step at every position: numbers for a series, logits for a text."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.embedding: nn.Module
        if config.vocabulary_size:
            self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        else:
            self.embedding = nn.Linear(config.features, config.width)
        self.lstm = nn.LSTM(
            config.width,
            config.width,
            num_layers=config.layers,
            dropout=config.dropout if config.layers > 1 else 0.0,
            batch_first=True,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.vocabulary_size or config.features)
        self._steps_at_a_time = config.steps_at_a_time

    def forward(self, steps: Tensor) -> Tensor:
        """Map (batch, time, features) or token numbers (batch, time) to (batch, time, features or vocabulary)."""
        embedded = self.embedding(steps)
        state = None
        pieces = []
        for piece in embedded.split(self._steps_at_a_time or embedded.shape[1], dim=1):
            hidden, state = self.lstm(piece, state)
            pieces.append(hidden)
        hidden = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
        result: Tensor = self.head(self.dropout(hidden))
        return result
