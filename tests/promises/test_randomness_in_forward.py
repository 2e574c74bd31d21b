"""Recompute with the same randomness as in forward: dropout, and Python's and NumPy's own generators.

See https://github.com/allenai/OLMo-core/issues/828 and https://github.com/pytorch/torchtitan/issues/1323.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.promises.training import differences, same_training, seed_everything, snapshot

BATCHES = [torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class PythonDrop(nn.Module):
    """Scales by a number from Python's generator and keeps a part of the columns that NumPy's chooses."""

    def forward(self, x: Tensor) -> Tensor:
        columns = torch.from_numpy(np.random.rand(x.shape[-1]) < 0.7)
        return torch.where(columns, torch.tanh(x * random.uniform(0.5, 1.5)), x.sin())


class Stochastic(nn.Module):
    """Every kind of randomness, and a layer that is skipped by a coin of Python's (stochastic depth)."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), PythonDrop(), nn.Linear(64, 32))
            for _ in range(4)
        )
        self.noise = nn.RReLU()
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if random.random() < 0.3:
                continue
            change = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            x = x + nn.functional.dropout(self.noise(change), 0.5)
        return x.pow(2).mean()


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Linear(64, 32), nn.Tanh()
        )
        self.channels = nn.Dropout1d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.layers(x)).pow(2).mean()


def test_dropout() -> None:
    trained = same_training(Dropout, BATCHES)
    assert trained.verdict.ok is True
    drawn = [recipe.op_names[place] for recipe in trained.plan.recipes for place in recipe.replay]
    assert any("bernoulli" in name for name in drawn), "no mask was drawn again"


def test_python_and_numpy_randomness_and_layers_that_are_skipped_at_random() -> None:
    """A skipped layer makes a step's operations others than the measured ones: that must cost no right gradient."""
    same_training(Stochastic, BATCHES)


def test_the_bug_is_real_checkpointing_draws_other_python_numbers() -> None:
    """What the row is about: the same model under `torch.utils.checkpoint` has other gradients, without an error."""
    results = []
    for checkpointed in (False, True):
        model = Stochastic(checkpointed=checkpointed)
        seed_everything()
        loss = model(BATCHES[0])
        loss.backward()
        results.append([snapshot(model, loss)])
    plain, recomputed = results
    assert torch.equal(plain[0]["loss"], recomputed[0]["loss"])
    assert any("gradient" in name for name in differences(plain, recomputed))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_comparison_would_notice_another_mask(seed: int) -> None:
    """Without this the equalities above could be empty."""
    results = []
    for draw in (seed, seed + 1):
        model = Dropout()
        seed_everything(draw)
        loss = model(BATCHES[0])
        loss.backward()
        results.append([snapshot(model, loss)])
    assert any("gradient" in name for name in differences(*results))
