"""Llama, as it is published: RMSNorm, rotary positions, attention with shared keys and values, SwiGLU.

Of PyTorch's own operations only, so that benchmarks need no other library, and its parts can be replaced by kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
Gate = Callable[[Tensor, Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """Sizes of a model."""

    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    layers: int = 1
    vocabulary: int = 32000


#: Of Llama 3 with 8 B parameters; 4 of its 32 blocks, and a smaller vocabulary.
LLAMA_8B = LlamaSizes(hidden=4096, heads=32, kv_heads=8, intermediate=14336, layers=4)


class RmsNorm(nn.Module):
    """Divide by the root of the mean square, computed in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * scaled.to(x.dtype)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """Return SwiGLU of the two halves."""
    return F.silu(gate) * up


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return causal attention of (batch, heads, time, width), with fewer heads of keys and values."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn (batch, heads, time, width) by the angles of its positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a model is made of, so that kernels can take the place of PyTorch's operations."""

    norm: Norm = RmsNorm
    gate: Gate = silu_times
    attention: Attention = attend
    rotate: Rotation = rotate


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, sizes: LlamaSizes, parts: Parts = Parts()) -> None:  # it cannot change
        super().__init__()
        self._heads, self._kv_heads, self._parts = sizes.heads, sizes.kv_heads, parts
        self._width = sizes.hidden // sizes.heads
        shared = sizes.kv_heads * self._width
        self.norm_1, self.norm_2 = parts.norm(sizes.hidden), parts.norm(sizes.hidden)
        self.query = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.key = nn.Linear(sizes.hidden, shared, bias=False)
        self.value = nn.Linear(sizes.hidden, shared, bias=False)
        self.output = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.gate = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        hidden = self.norm_1(x)
        query = self._parts.rotate(self._split(self.query(hidden), self._heads), cosine, sine)
        key = self._parts.rotate(self._split(self.key(hidden), self._kv_heads), cosine, sine)
        value = self._split(self.value(hidden), self._kv_heads)
        mixed = self._parts.attention(query, key, value)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        hidden = self.norm_2(x)
        return x + self.down(self._parts.gate(self.gate(hidden), self.up(hidden)))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self._width).transpose(1, 2)


class Llama(nn.Module):
    """The mean loss of the next token."""

    def __init__(self, sizes: LlamaSizes, parts: Parts = Parts()) -> None:  # it cannot change
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Block(sizes, parts) for _ in range(sizes.layers))
        self.norm = parts.norm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        self._rotary_width = sizes.hidden // sizes.heads

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens[:, :-1])
        cosine, sine = rotary(hidden.shape[1], self._rotary_width, hidden)
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def rotary(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the positions, of dtype and device of `like`."""
    frequencies = 500000.0 ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
