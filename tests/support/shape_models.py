"""A small transformer for tests of batches of many shapes, and what they compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.replay.helpers import snapshot
from tightfit.device.memory import measure_peak, resident_bytes

Tensor = torch.Tensor
WIDTH, WORDS = 32, 64


class Block(nn.Module):
    """Attention and a feed-forward layer, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.attention(self.norm1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    def __init__(self, depth: int = 2, longest: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(longest, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, WORDS)
        self.forwards = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.forwards += 1
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def next_word_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batch_of(length: int, size: int = 4) -> Tensor:
    return torch.randint(0, WORDS, (size, length + 1), generator=torch.Generator().manual_seed(length))


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    """What a forward and backward from a fixed seed leave behind."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=False)
    value = loss()
    value.backward()
    return snapshot(model, value)


def peak_of(model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> int:
    """Peak of a whole step by the independent meter."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss().backward()
        optimizer.step()

    return measure_peak(step, resident_bytes(model, batch, optimizer))[1]
