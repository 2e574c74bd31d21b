"""Kernels as fused ones of libraries look to PyTorch: an `autograd.Function` whose forward no dispatcher sees into."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class FusedNorm(torch.autograd.Function):
    """As Liger's: normalises past the dispatcher, and saves its input and the reciprocal deviations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, reciprocal = torch.empty_like(x), torch.empty(x.shape[:-1])
        array = x.detach().numpy()
        reciprocal.numpy()[...] = 1 / np.sqrt((array**2).mean(-1) + epsilon)
        np.multiply(array * reciprocal.numpy()[..., None], weight.detach().numpy(), out=out.numpy())
        ctx.save_for_backward(x, weight, reciprocal)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # PyTorch's signature is wider
        x, weight, reciprocal = ctx.saved_tensors
        scale = reciprocal[..., None]
        inner = grad * weight
        projected = inner - x * scale**2 * (inner * x).mean(-1, keepdim=True)
        return projected * scale, (grad * x * scale).flatten(0, -2).sum(0), None


class FusedGate(torch.autograd.Function):
    """As Liger's SwiGLU: one kernel for the activation and the product."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        array = gate.detach().numpy()
        np.multiply(array / (1 + np.exp(-array)), up.detach().numpy(), out=out.numpy())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # PyTorch's signature is wider
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


class FusedAttention(torch.autograd.Function):
    """As flash_attn's: a raw kernel that saves its result and the sums of its rows; options are arguments."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        assert scale is None
        out, sums = torch.empty_like(q), torch.empty(q.shape[:-1])
        scores = q.detach().numpy() @ k.detach().numpy().swapaxes(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = np.where(np.tri(q.shape[-2], dtype=bool), scores, -np.inf)
        weights = np.exp(scores)
        sums.numpy()[...] = weights.sum(-1)
        out.numpy()[...] = (weights @ v.detach().numpy()) / sums.numpy()[..., None]
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # PyTorch's signature is wider
        q, k, v, out, sums = ctx.saved_tensors
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if ctx.causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        weights = scores.exp() / sums[..., None]
        inner = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        return inner @ k, inner.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad, None, None
