"""A causal language model: pre-norm transformer blocks with learned positions and tied weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.errors import UnsupportedInput
from tightfit.operators.pure_modules import allow_recompute


@dataclass(frozen=True, kw_only=True)
class GptConfig:
    """Sizes of a `Gpt`."""

    vocabulary_size: int = 256
    """Token numbers are below this."""
    sequence_length: int = 256
    """Longest sequence."""
    width: int = 128
    """Size of a token's vector."""
    layers: int = 6
    """Number of blocks."""
    heads: int = 4
    """Attention heads in each block."""
    dropout: float = 0.1
    """Probability of dropping, after the embedding, in the attention and after each half of a block."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UnsupportedInput(
                f"width {self.width} cannot be split among {self.heads} heads. Each head takes an equal share. "
                f"Choose a width that is a multiple of the heads: --model-args width=... heads=..."
            )


class Gpt(nn.Module):
    """Logits of the next token at every position."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.sequence_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self.register_buffer("positions", torch.arange(config.sequence_length), persistent=False)
        self.positions: Tensor
        self.apply(self._initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, time, vocabulary) for token numbers (batch, time)."""
        positions = self.positions[: tokens.shape[1]]
        hidden = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to what came in."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
            nn.Dropout(config.dropout),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        transformed: Tensor = self.mlp(self.mlp_norm(hidden))
        return hidden + transformed


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.dropout
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = hidden.shape
        projected = self.query_key_value(hidden).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.attention_dropout if self.training else 0.0, is_causal=True
        )
        joined = attended.transpose(1, 2).reshape(batch, time, width)
        result: Tensor = self.dropout(self.output(joined))
        return result


allow_recompute(Attention, Block)
