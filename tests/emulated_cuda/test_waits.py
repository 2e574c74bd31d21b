"""A planned step waits for the device exactly as often as the plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tests.emulated_cuda import counters
from tightfit.solver.solver import full_plan
from tightfit.step.step import Step


class Looks(nn.Module):
    """Reads a number of the device in forward, which plain pays for, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).sin()
        return self.down(y.exp()) if float(y.detach().sum()) < 1e9 else x


class Convolutions(nn.Module):
    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(3)
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and frozen:
                module.eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1))
        self.lstm = nn.LSTM(32, 32, num_layers=2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.before(x))[0]


def attention() -> nn.Module:
    layers = [nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True) for _ in range(3)]
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    # the model, its batch's shape, how often its plain step waits
    "attention": (attention, (4, 16, 32), 0),
    "convolutions": (lambda: Convolutions(frozen=False), (4, 8, 16, 16), 0),
    "frozen": (lambda: Convolutions(frozen=True), (4, 8, 16, 16), 0),
    "recurrent": (Recurrent, (4, 16, 32), 0),
    "looks": (Looks, (4, 32), 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_as_often_as_plain(name: str) -> None:
    make, shape, expected = MODELS[name]
    model, batch = make().to("cuda"), torch.randn(shape, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    step = Step(loss=lambda model, batch: model(batch).square().mean(), optimizer=optimizer)
    profile = tightfit.measure(model, batch, step=step)
    with tightfit.apply(model, full_plan(profile, 2**50), step=step) as applied:

        def train() -> None:
            applied.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        def waits() -> int:
            for _ in range(2):  # the first one checks itself
                train()
            with counters.counted() as calls:
                train()
            return calls.syncs

        applied.statistics.reset()
        planned = waits()
        assert applied.statistics.replayed_ops > 0
        assert applied.statistics.mismatches == 0
        with applied.paused():
            assert planned == waits() == expected
