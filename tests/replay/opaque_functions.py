"""Opaque calls for random programs: functions with kernels of their own, and operators of `torch.library`."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor


class Masked(torch.autograd.Function):
    """Draws from PyTorch's generator, and applies the mask past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask, out = torch.bernoulli(torch.full_like(x, 0.7)), torch.empty(x.shape, dtype=x.dtype)
        np.multiply(x.detach().numpy(), mask.numpy(), out=out.numpy())
        ctx.save_for_backward(mask, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        mask, out = ctx.saved_tensors
        return grad * mask + 0 * out


class Keeping(torch.autograd.Function):
    """Works at addresses, keeps what backward needs as attributes, and has two kinds of inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        x = x.contiguous()
        copy = torch.empty(x.shape, dtype=x.dtype)
        ctypes.memmove(copy.data_ptr(), x.data_ptr(), x.numel() * x.itemsize)
        ctx.copy, ctx.cosine = copy, x.cos()
        ctx.save_for_backward(y)
        return copy * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # PyTorch's signature is wider
        (y,) = ctx.saved_tensors
        return grad * y + 0 * ctx.cosine, grad * ctx.copy


@torch.library.custom_op("tightfit_programs::squash", mutates_args=())
def squash(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    np.tanh(x.detach().numpy(), out=out.numpy())
    return out


@squash.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


squash.register_autograd(
    lambda ctx, grad: grad * (1 - ctx.saved_tensors[0] ** 2),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


@torch.library.custom_op("tightfit_programs::halve_", mutates_args=("x",))
def halve_(x: Tensor) -> None:
    x.mul_(0.5)


@halve_.register_fake
def _(x: Tensor) -> None:
    return None


def halved_in_place(_: Any, a: Tensor, b: Tensor) -> Tensor:
    """An operator that says that it writes, on something that nobody differentiates."""
    y = (a.detach() + b.detach()).sin()
    before = y.cos()
    halve_(y)
    return a * y * before
