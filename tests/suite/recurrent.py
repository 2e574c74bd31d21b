"""Models that go step by step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.suite.case import Case, Size

_FEATURES = 8


def _series(count: int, steps: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, steps, _FEATURES), torch.randn(count, 1)


def _regression_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    series, target = batch
    return F.mse_loss(model(series), target)


class Recurrent(nn.Module):
    """PyTorch's own recurrent layers and a head on the last step."""

    def __init__(self, layers: nn.LSTM | nn.GRU, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(_FEATURES, width)
        self.layers = layers
        self.head = nn.Linear(width, 1)

    def forward(self, series: Tensor) -> Tensor:
        hidden, _ = self.layers(torch.tanh(self.embed(series)))
        return self.head(F.dropout(hidden, 0.1, self.training)[:, -1])


def lstm(size: Size) -> Case:
    """Fused LSTM layers."""
    count, steps, width = (4, 12, 16) if size == "tiny" else (32, 100, 64)
    model = Recurrent(nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=0.1), width)
    return Case(model=model, batch=_series(count, steps), loss=_regression_loss)


def gru(size: Size) -> Case:
    """GRU layers, which PyTorch runs as single operations on CPU."""
    count, steps, width = (4, 6, 16) if size == "tiny" else (32, 80, 64)
    model = Recurrent(nn.GRU(width, width, num_layers=1, batch_first=True), width)
    return Case(model=model, batch=_series(count, steps), loss=_regression_loss)


class Loop(nn.Module):
    """A cell called in a Python loop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(_FEATURES, width)
        self.cell = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, series: Tensor) -> Tensor:
        state = series.new_zeros(series.shape[0], self.cell.out_features)
        for inputs in series.unbind(1):
            new = torch.tanh(self.read(inputs) + self.cell(state))
            gate = torch.sigmoid(self.gate(state))
            state = gate * state + (1 - gate) * new
        return self.head(state)


def rnn_loop(size: Size) -> Case:
    """A hand-written recurrence of 200 steps (5 at the tiny size)."""
    count, steps, width = (4, 5, 8) if size == "tiny" else (64, 200, 128)
    return Case(model=Loop(width), batch=_series(count, steps), loss=_regression_loss)
