"""Operations that PyTorch itself sends another way where tensors are on CUDA, and that ask them in C++.

The conditions are those of PyTorch 2.13: ``native/Dropout.cpp``, ``native/SoftMax.cpp``,
``native/transformers/attention.cpp`` and ``native/transformers/cuda/sdp_utils.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tightfit._torch_private.dispatch import find_overload

_FLASH = find_overload("aten._scaled_dot_product_flash_attention.default")
_EFFICIENT = find_overload("aten._scaled_dot_product_efficient_attention.default")
_MATH = find_overload("aten._scaled_dot_product_attention_math.default")
_DROPOUT = find_overload("aten.native_dropout.default")
_SOFTMAX = find_overload("aten._softmax.default")
_LOG_SOFTMAX = find_overload("aten._log_softmax.default")

_HALVES = (torch.float16, torch.bfloat16)
_WIDEST_FLASH_HEAD = 256
#: Flash attention pads heads to a multiple of so many; an additive mask's rows are padded to a multiple of as many.
_FLASH_STEP = 8
_MASK_STEP = 16
_AMPERE = 80


def kernels_of(compute_capability: int) -> Mapping[str, Callable[..., Any]]:
    """Return the kernels, by the operation that each is of."""

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        tensors = query, key, value
        mask = _additive(attn_mask, query.dtype)
        if mask is None and runs_flash(*tensors, compute_capability=compute_capability, gqa=enable_gqa):
            return _flash(*tensors, dropout_p, is_causal, scale)
        if runs_efficient(*tensors, compute_capability=compute_capability, gqa=enable_gqa):
            logsumexp = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, mask) if t is not None)
            found = _EFFICIENT(*tensors, _padded(mask, query, key), logsumexp, dropout_p, is_causal, scale=scale)
            return found[0]  # type: ignore[no-any-return]  # operators are not annotated
        found = _MATH(*tensors, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)
        return found[0]  # type: ignore[no-any-return]  # operators are not annotated

    return {"dropout": _dropout, "softmax.int": _softmax, "log_softmax.int": _log_softmax, _ATTENTION: attention}


_ATTENTION = "scaled_dot_product_attention"


def runs_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, compute_capability: int, gqa: bool
) -> bool:
    """Tell whether flash attention is chosen, where there is no mask."""
    alike = _are_dense(query, key, value, gqa=gqa) and query.shape[-1] == value.shape[-1]
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and compute_capability >= _AMPERE
        and query.dtype in _HALVES
        and alike
        and query.shape[-1] <= _WIDEST_FLASH_HEAD
    )


def runs_efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, compute_capability: int, gqa: bool
) -> bool:
    """Tell whether memory-efficient attention is chosen, where flash attention is not."""
    known = query.dtype in (torch.float32, torch.float16) or (
        query.dtype is torch.bfloat16 and compute_capability >= _AMPERE
    )
    aligned = 16 // query.itemsize if query.dtype in _HALVES or compute_capability >= _AMPERE else 1
    widths_fit = query.shape[-1] % aligned == 0 and value.shape[-1] % aligned == 0
    enabled = torch.backends.cuda.mem_efficient_sdp_enabled()
    return enabled and known and widths_fit and not gqa and _are_dense(query, key, value, gqa=False)


def _are_dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, gqa: bool) -> bool:
    """Tell whether they have four dimensions, the same batch and heads, and rows without gaps."""
    tensors = query, key, value
    if any(t.dim() != 4 or t.stride(-1) != 1 or 0 in t.shape for t in tensors):
        return False
    batches = {t.shape[0] for t in tensors}
    heads = {t.shape[1] for t in tensors}
    return len(batches) == 1 and (len(heads) == 1 or gqa)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    width = query.shape[-1]
    more = -width % _FLASH_STEP
    if more:
        query, key, value = (torch.nn.functional.pad(t, (0, more)) for t in (query, key, value))
        scale = 1 / math.sqrt(width) if scale is None else scale
    found = _FLASH(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return found[..., :width] if more else found  # type: ignore[no-any-return]  # operators are not annotated


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -math.inf)


def _padded(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Expand a mask to all heads, in rows whose length is a multiple of what the kernel wants."""
    if mask is None:
        return None
    length = mask.shape[-1]
    if more := -length % _MASK_STEP:
        mask = torch.nn.functional.pad(mask, (0, more))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _dropout(tensor: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if p == 0 or not train or tensor.numel() == 0:
        return tensor
    if p == 1:
        return tensor.mul(torch.zeros((), dtype=tensor.dtype, device=tensor.device))
    return _DROPOUT(tensor, p, train)[0]  # type: ignore[no-any-return]  # operators are not annotated


def _softmax(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _rowwise(_SOFTMAX, tensor, dim, dtype)


def _log_softmax(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _rowwise(_LOG_SOFTMAX, tensor, dim, dtype)


def _rowwise(kernel: Callable[..., torch.Tensor], tensor: torch.Tensor, dim: int, dtype: Any) -> torch.Tensor:
    """Widen halves inside the kernel, without a copy."""
    if tensor.dtype is torch.float16 and dtype is torch.float32:
        return kernel(tensor, dim, True)
    return kernel(tensor if dtype is None else tensor.to(dtype), dim, False)
