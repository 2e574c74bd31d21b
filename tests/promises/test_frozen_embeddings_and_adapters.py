"""Train a frozen embedding with adapters: no input requires a gradient, and every adapter is trained.

See https://github.com/pytorch/pytorch/issues/7617 and https://github.com/huggingface/peft/issues/137.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.promises.training import same_training

BATCHES = [torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Lora(nn.Module):
    """A frozen linear layer and a trainable low-rank change of it."""

    def __init__(self, width: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x)))


class Adapted(nn.Module):
    """`reentrant`: each block under `torch.utils.checkpoint` as many libraries still call it."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32).requires_grad_(False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32).requires_grad_(False), Lora(32), nn.GELU(), Lora(32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 50).requires_grad_(False)
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.reentrant else x + block(x)
        return self.head(x)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def test_every_adapter_is_trained_as_plain_and_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = same_training(Adapted, BATCHES, loss_of)
    for name, parameter in trained.planned.named_parameters():
        trainable = ".up." in name or ".down." in name
        assert parameter.requires_grad is trainable
        gradients = [step[f"gradient of {name}"] for step in trained.steps]
        if trainable:
            assert all(gradient is not None for gradient in gradients), name
            assert gradients[-1].count_nonzero() > 0, name
        else:
            assert gradients == [None] * len(BATCHES), name
    assert trained.verdict.ok is True


def test_the_bug_is_real_reentrant_checkpointing_leaves_the_adapters_untrained() -> None:
    """What the issues are about; were tightfit to checkpoint so, the test above would find it."""
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        loss = loss_of(Adapted(reentrant=True), BATCHES[0])
    assert not loss.requires_grad
