"""One rank of Megatron-Core's GPT as SysSim ran it on GH200s: what it allocates, operation by operation.

The runner (``examples/megatron/run_megatron.py`` of github AISysSim/SysSim @6f02e8e) takes the architecture's sizes,
but none of its other settings: the model is Megatron-Core's default one, with LayerNorm, biases, a GELU without gate,
learned positions, dropout of 0.1, and attention whose scores are made whole.  No kernel is fused.  Weights are bf16;
their gradients are added to buffers in fp32 (``grad_reduce_in_fp32``), beside which are fp32 weights and both moments
of Adam, divided among data-parallel ranks (``use_distributed_optimizer``).

A rank holds its part of every matrix; collectives work in place.  What they take outside PyTorch is not asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tightfit.step.weightless import without_weights

_DROPOUT = 0.1
#: Bytes of each weight beside itself: its gradient; a copy in fp32 and Adam's two moments.
_STATES = 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model of SysSim's, as its YAML says."""

    layers: int
    hidden: int
    heads: int
    groups: int
    feed_forward: int
    tokens: int
    positions: int
    vocabulary: int


#: ``examples/megatron/llama3-8b.yaml`` and ``qwen3-8b.yaml``.
MODELS = {
    "llama3-8b": Sizes(
        layers=32,
        hidden=4096,
        heads=32,
        groups=8,
        feed_forward=14336,
        tokens=8192,
        positions=8192,
        vocabulary=128256,
    ),
    "qwen3-8b": Sizes(
        layers=36,
        hidden=4096,
        heads=32,
        groups=8,
        feed_forward=12288,
        tokens=4096,
        positions=40960,
        vocabulary=151936,
    ),
}


class _MainGradients(torch.autograd.Function):
    """A matrix product whose gradients of weight and bias go to buffers in fp32."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, layer: _Matrix, adds_bias: bool) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.layer, ctx.adds_bias = layer, adds_bias
        output = torch.matmul(value, layer.weight.t())
        return output + layer.bias if adds_bias else output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (value,) = ctx.saved_tensors
        layer = ctx.layer
        of_value = gradient.matmul(layer.weight)
        rows = gradient.reshape(-1, gradient.shape[-1])
        layer.weight_main.add_(rows.t().matmul(value.reshape(-1, value.shape[-1])))
        if ctx.adds_bias:
            layer.bias_main.add_(rows.sum(0))
        return of_value, None, None


class _Looked(torch.autograd.Function):
    """Looking tokens up; the gradient of the table goes to a buffer in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, table: _Matrix, anchor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.table = table
        return F.embedding(tokens, table.weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (tokens,) = ctx.saved_tensors
        table = ctx.table
        dense = torch.ops.aten.embedding_dense_backward(gradient, tokens, table.weight.shape[0], -1, False)
        table.weight_main.add_(dense)
        return None, None, None


class _AddedBias(torch.autograd.Function):
    """Adding a bias that its product has left out."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, layer: _Matrix) -> torch.Tensor:
        ctx.layer = layer
        return value + layer.bias

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.layer.bias_main.add_(gradient.sum((0, 1)))
        return gradient, None


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy of a part of the vocabulary: the softmax, in fp32, is made in place and kept."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        logits -= torch.max(logits, dim=-1)[0].unsqueeze(-1)
        elsewhere = (labels < 0) | (labels >= logits.shape[-1])
        rows = logits.view(-1, logits.shape[-1])
        numbers = torch.arange(rows.shape[0], device=rows.device)
        places = labels.clone().view(-1)
        predicted = rows[numbers, places].view_as(labels)
        torch.exp(logits, out=logits)
        total = logits.sum(dim=-1)
        loss = torch.log(total) - predicted
        logits.div_(total.unsqueeze(-1))
        ctx.save_for_backward(logits, elsewhere, places)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        softmax, elsewhere, places = ctx.saved_tensors
        rows = softmax.view(-1, softmax.shape[-1])
        numbers = torch.arange(rows.shape[0], device=rows.device)
        rows[numbers, places] -= 1.0 - elsewhere.view(-1).float()
        softmax.mul_(gradient.unsqueeze(-1))
        return softmax, None


class _Matrix(nn.Module):
    """A rank's part of a matrix, with all that Megatron keeps for it."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, rows: int, columns: int, states: float, *, has_bias: bool = True) -> None:
        super().__init__()
        for name, shape in {"weight": (rows, columns), "bias": (rows,)}.items():
            if name == "bias" and not has_bias:
                continue
            count = math.prod(shape)
            self.register_buffer(name, torch.empty(shape, dtype=torch.bfloat16, device="meta"))
            self.register_buffer(f"{name}_main", torch.empty(shape, device="meta"))
            for kind in range(_STATES):
                self.register_buffer(f"{name}_state{kind}", torch.empty(math.ceil(count * states), device="meta"))

    def forward(self, value: torch.Tensor, *, adds_bias: bool = False) -> torch.Tensor:
        found: torch.Tensor = _MainGradients.apply(value, self, adds_bias)  # type: ignore[no-untyped-call]  # PyTorch's
        return found

    def added(self, value: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _AddedBias.apply(value, self)  # type: ignore[no-untyped-call]  # PyTorch's
        return found


class _Layer(nn.Module):
    def __init__(self, sizes: Sizes, tensor: int, states: float) -> None:
        super().__init__()
        self.width = sizes.hidden // sizes.heads
        self.heads, self.groups = sizes.heads // tensor, sizes.groups // tensor
        part = self.heads * self.width
        self.before_attention = nn.LayerNorm(sizes.hidden, dtype=torch.bfloat16)
        self.before_mlp = nn.LayerNorm(sizes.hidden, dtype=torch.bfloat16)
        self.inward = _Matrix(part + 2 * self.groups * self.width, sizes.hidden, states)
        self.outward = _Matrix(sizes.hidden, part, states)
        self.up = _Matrix(sizes.feed_forward // tensor, sizes.hidden, states)
        self.down = _Matrix(sizes.hidden, sizes.feed_forward // tensor, states)

    def forward(self, hidden: torch.Tensor, buffer: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attended = self.outward(self._attention(self.before_attention(hidden), buffer, mask))
        hidden = hidden + F.dropout(self.outward.added(attended), _DROPOUT, self.training)
        del attended
        inner = self.up(self.before_mlp(hidden))
        inner = self.up.added(inner)
        inner = F.gelu(inner)
        output = self.down(inner)
        del inner
        return hidden + F.dropout(self.down.added(output), _DROPOUT, self.training)

    def _attention(self, hidden: torch.Tensor, buffer: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length, batch, _ = hidden.shape
        heads, groups, width = self.heads, self.groups, self.width
        mixed = self.inward(hidden, adds_bias=True).view(length, batch, groups, -1)
        query, key, value = mixed.split([heads // groups * width, width, width], dim=3)
        query = query.reshape(length, batch, heads, width)
        key = key.repeat_interleave(heads // groups, dim=2)
        value = value.repeat_interleave(heads // groups, dim=2)
        query = query.reshape(length, batch * heads, width)
        key = key.view(length, batch * heads, width)
        scores = torch.baddbmm(
            buffer, query.transpose(0, 1), key.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=width**-0.5
        )
        # Written into through a view of what a product gave: backward copies its gradient twice for that.
        scores = scores.view(batch, heads, length, length)
        scores.masked_fill_(mask, -10000.0)
        weights = F.dropout(F.softmax(scores, dim=-1), _DROPOUT, self.training)
        weights = weights.view(batch * heads, length, length)
        context = torch.bmm(weights, value.view(length, batch * heads, width).transpose(0, 1))
        context = context.view(batch, heads, length, width).permute(2, 0, 1, 3).contiguous()
        return context.view(length, batch, heads * width)


class Rank(nn.Module):
    """What one rank holds of a model, and its forward pass, in pieces of `tensor` ranks."""

    buffer: torch.Tensor
    mask: torch.Tensor

    def __init__(self, sizes: Sizes, *, tensor: int, data: int, recomputes: bool) -> None:
        super().__init__()
        states = 1 / data
        self._recomputes = recomputes
        self.words = _Matrix(sizes.vocabulary // tensor, sizes.hidden, states, has_bias=False)
        self.positions = _Matrix(sizes.positions, sizes.hidden, states, has_bias=False)
        self.layers = nn.ModuleList(_Layer(sizes, tensor, states) for _ in range(sizes.layers))
        self.last = nn.LayerNorm(sizes.hidden, dtype=torch.bfloat16)
        self.output = _Matrix(sizes.vocabulary // tensor, sizes.hidden, states, has_bias=False)
        # What attention's scores are said to be added to: kept by ``get_global_memory_buffer`` from the first call on.
        shape = sizes.heads // tensor, sizes.tokens, sizes.tokens
        self.register_buffer("buffer", torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        # One mask for all layers, kept: ``lru_cache`` of ``get_default_causal_mask``, which later versions do not have.
        self.register_buffer("mask", torch.empty(sizes.tokens, sizes.tokens, dtype=torch.bool, device="meta"))

    def forward(self, tokens: torch.Tensor, places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        anchor = self.last.weight
        hidden = _Looked.apply(tokens, self.words, anchor)  # type: ignore[no-untyped-call]  # PyTorch's
        hidden = hidden + _Looked.apply(places, self.positions, anchor)  # type: ignore[no-untyped-call]  # PyTorch's
        hidden = F.dropout(hidden.transpose(0, 1).contiguous(), _DROPOUT, self.training)
        for layer in self.layers:
            if self._recomputes:
                hidden = checkpoint(layer, hidden, self.buffer, self.mask, use_reentrant=True)
            else:
                hidden = layer(hidden, self.buffer, self.mask)
        logits = self.output(self.last(hidden))
        labels = labels.transpose(0, 1).contiguous()
        losses = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]  # PyTorch's
        return losses.mean()  # type: ignore[no-any-return]  # what an `autograd.Function` gives is not annotated


def rank_of(name: str, *, tensor: int, data: int, recomputes: bool) -> tuple[nn.Module, Any]:
    """Return what a rank trains, without weights, and its batch of one sequence."""
    sizes = MODELS[name]
    with without_weights():
        model = Rank(sizes, tensor=tensor, data=data, recomputes=recomputes)
    tokens = torch.empty(1, sizes.tokens, dtype=torch.long, device="meta")
    return model.train(), (tokens, torch.empty_like(tokens), torch.empty_like(tokens))
