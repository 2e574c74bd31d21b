"""A loop in the manner of nanoGPT, as it is and inside a budget: accumulation, GradScaler, clipping, evaluation.

python examples/nanogpt_loop.py [--budget 7MiB]     needs nothing but tightfit
"""

from __future__ import annotations

import math

import torch
from comparison import beside, compare
from torch import Tensor, nn
from torch.nn import functional

import tightfit

VOCABULARY, LENGTH, WIDTH, ROWS, ACCUMULATION = 256, 64, 64, 4, 2
DATA = torch.randint(0, VOCABULARY, (4096,))


class Block(nn.Module):
    """Attention and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next block gets."""
        heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.attention(self.first(x)).chunk(3, -1)]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class GPT(nn.Module):
    """A language model whose head and embedding are one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and loss."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def some_batch() -> tuple[Tensor, Tensor]:
    """Draw a batch."""
    starts = torch.randint(len(DATA) - LENGTH - 1, (ROWS,)).tolist()
    return tuple(torch.stack([DATA[start + by : start + by + LENGTH] for start in starts]) for by in (0, 1))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss, under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(*batch)
    return loss


def train(budget: str | None) -> nn.Module:
    """Three times some steps and an evaluation; the only difference is how the loss is called."""
    model = GPT()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    scaler = torch.amp.GradScaler("cpu")
    loss = loss_of
    if budget is not None:  # of which the scaler's few figures take a little
        loss = tightfit.fit(
            model,
            tuple(torch.zeros(ROWS, LENGTH, dtype=torch.int64) for _ in range(2)),  # no variable: it would stay
            budget=beside(budget, 2**10), loss=loss_of, optimizer=optimizer,
            accumulation_steps=ACCUMULATION, clip_norm=1.0,
        ).loss  # fmt: skip
    for number in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * number / 12)) / 2
        for _ in range(ACCUMULATION):
            scaler.scale(loss(model, some_batch()) / ACCUMULATION).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if number % 4 == 3:
            model.eval()
            with torch.no_grad():
                loss_of(model, some_batch())
            model.train()
    return model


if __name__ == "__main__":
    compare(train, budget="7MiB")
