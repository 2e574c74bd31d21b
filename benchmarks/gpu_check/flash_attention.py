"""Flash attention as a custom operator, as the flash_attn package brings it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("gpu_check::flash_forward", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    length = query.shape[1]
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, None, None, length, length, 0.0, True, False
    )
    return out, logsumexp


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return torch.empty_like(query), query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("gpu_check::flash_backward", mutates_args=())
def _backward(
    given: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    length = query.shape[1]
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is not
    gradients = torch.ops.aten._flash_attention_backward(
        given, query, key, value, out, logsumexp, None, None, length, length, 0.0, True, seed, seed
    )
    return tuple(gradients)


@_backward.register_fake
def _(
    given: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, logsumexp = _forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(given.contiguous(), *ctx.saved_tensors)


def flash_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `benchmarks.llama.attend`."""
    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    return _Flash.apply(query, key, value).transpose(1, 2)
