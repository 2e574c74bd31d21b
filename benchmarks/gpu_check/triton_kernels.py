"""Llama's norm, rotation and gate by Triton kernels, launched from Python as Liger's are: no dispatcher sees them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn


@triton.jit
def _norm_forward(x, weight, y, inverse, width, BLOCK: tl.constexpr):  # noqa: N803  # Triton's way of writing constants
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < width
    values = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values) / width + 1e-5)
    tl.store(inverse + row, scale)
    weights = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + place, (values * scale * weights).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(x, weight, inverse, dy, dx, partial, width, BLOCK: tl.constexpr):  # noqa: N803  # Triton's way of writing constants
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < width
    values = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(dy + row * width + place, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(inverse + row)
    weighted = given * weights
    shared = tl.sum(weighted * values) * scale * scale / width
    tl.store(dx + row * width + place, (scale * (weighted - values * shared)).to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + row * width + place, given * values * scale, mask=inside)


@triton.jit
def _gate_forward(gate, up, out, count, BLOCK: tl.constexpr):  # noqa: N803  # Triton's way of writing constants
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    a = tl.load(gate + place, mask=inside).to(tl.float32)
    b = tl.load(up + place, mask=inside).to(tl.float32)
    tl.store(out + place, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(gate, up, given, d_gate, d_up, count, BLOCK: tl.constexpr):  # noqa: N803  # Triton's way of writing constants
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    a = tl.load(gate + place, mask=inside).to(tl.float32)
    b = tl.load(up + place, mask=inside).to(tl.float32)
    g = tl.load(given + place, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    d_a = g * b * sigmoid * (1 + a * (1 - sigmoid))
    tl.store(d_gate + place, d_a.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + place, (g * a * sigmoid).to(d_up.dtype.element_ty), mask=inside)


@triton.jit
def _turn(x, cosine, sine, y, length, half, direction, BLOCK: tl.constexpr):  # noqa: N803  # Triton's way of writing constants
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < half
    angle = (row % length) * 2 * half + place  # the second half of the angles repeats the first
    c = tl.load(cosine + angle, mask=inside).to(tl.float32)
    s = tl.load(sine + angle, mask=inside).to(tl.float32) * direction
    first = tl.load(x + row * 2 * half + place, mask=inside).to(tl.float32)
    second = tl.load(x + row * 2 * half + half + place, mask=inside).to(tl.float32)
    tl.store(y + row * 2 * half + place, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + row * 2 * half + half + place, (second * c + first * s).to(y.dtype.element_ty), mask=inside)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        y, inverse = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        _norm_forward[(rows,)](x, weight, y, inverse, width, BLOCK=triton.next_power_of_2(width))
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, inverse = ctx.saved_tensors
        given = given.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        dx = torch.empty_like(x)
        partial = torch.empty(rows, width, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        _norm_backward[(rows,)](x, weight, inverse, given, dx, partial, width, BLOCK=block)
        return dx, partial.sum(0).to(weight.dtype)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _gate_forward[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel(), BLOCK=1024)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        given = given.contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), 1024),)
        _gate_backward[grid](gate, up, given, d_gate, d_up, gate.numel(), BLOCK=1024)
        return d_gate, d_up


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        return _turned(given, *ctx.saved_tensors, -1.0), None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    x = x.contiguous()
    y, (length, width) = torch.empty_like(x), x.shape[-2:]
    block = triton.next_power_of_2(width // 2)
    _turn[(x.numel() // width,)](x, cosine, sine, y, length, width // 2, direction, BLOCK=block)
    return y


class TritonRmsNorm(nn.Module):
    """As `benchmarks.llama.RmsNorm`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight)


def triton_silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """As `benchmarks.llama.silu_times`."""
    return _Gate.apply(gate, up)


def triton_rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As `benchmarks.llama.rotate`."""
    return _Rotation.apply(x, cosine, sine)
