"""What operations would take on a card: times by a roofline, and workspaces by what the kernels are known to allocate.

Time: the longer of moving an operation's arguments and results through the card's memory and of its arithmetic, each at
a share of the card's peak rate (Williams, Waterman and Patterson, "Roofline", 2009).  The shares are what well-tuned
kernels reach, not what any card was measured at, so times are estimates, and the profile's notes say so.

Workspace: of kernels that allocate much through PyTorch's allocator, as their sources do.  What convolutions may take
of it beyond that is optional: cuDNN chooses another algorithm where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from tightfit.device.described.gpu import DescribedDevice
from tightfit.profiling.partial_call import argument_bytes
from tightfit.profiling.signatures import Call, TensorSpec
from tightfit.records import Signature

#: Of the peak rates: of the memory's in element-wise kernels, of the arithmetic's in large products.
_BANDWIDTH_SHARE, _ARITHMETIC_SHARE = 0.8, 0.6
#: What submitting an operation takes the host, as PyTorch's dispatcher does on current processors.
_HOST_MS = 0.005
#: What a kernel takes that has nothing to do.
_KERNEL_MS = 0.003
_NOTE = "estimated from the card's rates"
_HALVES = (torch.float16, torch.bfloat16)


def estimate(calls: Sequence[Call], result_bytes: Mapping[int, int], device: DescribedDevice) -> tuple[Signature, ...]:
    """Return the signature of each call, with what it would take on the device.

    Args:
        calls: the operations.
        result_bytes: by the call's number, memory that its results take.
        device: the card.
    """
    return tuple(
        Signature(
            name=str(call.func),
            ms=_HOST_MS,
            device_ms=round(_device_ms(call, result_bytes.get(index, 0), device), 6),
            workspace_bytes=workspace_bytes(call),
            note=_NOTE,
        )
        for index, call in enumerate(calls)
    )


def _device_ms(call: Call, result_bytes: int, device: DescribedDevice) -> float:
    card = device.card
    moved = argument_bytes(call) + result_bytes
    moving_ms = moved / (card["bandwidth_gb_s"] * 1e9 * _BANDWIDTH_SHARE) * 1e3
    halves = any(isinstance(one, TensorSpec) and one.dtype in _HALVES for one in call.args)
    rate = card["half_tflops" if halves else "fp32_tflops"] * 1e12 * _ARITHMETIC_SHARE
    return max(_KERNEL_MS, moving_ms, _flops(call) / rate * 1e3)


def _flops(call: Call) -> float:
    """Count the arithmetic of a product, a convolution or attention; 0 of what moves data mostly."""
    count = flop_registry.get(getattr(call.func, "overloadpacket", None))
    if count is None:
        return 0
    args = [_shaped(argument) for argument in call.args]
    kwargs = {name: _shaped(value) for name, value in call.kwargs}
    try:
        result = call.func(*args, **kwargs)
        return float(count(*args, **kwargs, out_val=result))
    except Exception:  # a kernel that knows no tensors without data: what it moves then has to do
        return 0


def _shaped(argument: Any) -> Any:
    if isinstance(argument, TensorSpec):
        return torch.empty_strided(argument.size, argument.stride, dtype=argument.dtype, device="meta")
    return [_shaped(one) for one in argument] if isinstance(argument, tuple) else argument


def workspace_bytes(call: Call) -> int:
    """Return what an operation allocates beyond its results, and frees before it is done."""
    rule = _WORKSPACES.get(str(call.func))
    return 0 if rule is None else rule(call)


def _tensors(call: Call) -> list[TensorSpec]:
    return [argument for argument in call.args if isinstance(argument, TensorSpec)]


def _count(spec: TensorSpec) -> int:
    return math.prod(spec.size)


def _flash_backward(call: Call) -> int:
    """``flash_attn/flash_api.cpp``: sums of queries' gradients and of rows in fp32, lengths rounded to 128."""
    query, key = _tensors(call)[1:3]
    batch, heads, length, width = query.size
    rows = batch * heads * (-(-length // 128) * 128)
    repeated = 2 * _count(key) * (heads // key.size[1]) * key.dtype.itemsize if key.size[1] != heads else 0
    return rows * (-(-width // 32) * 32) * 4 + rows * 4 + repeated


def _efficient_backward(call: Call) -> int:
    """``transformers/cuda/attention_backward.cu``: a sum for each row, and in halves sums of all gradients in fp32."""
    query, key, value = _tensors(call)[1:4]
    rows = math.prod(query.size[:3]) * 4
    if query.dtype is torch.float32:
        return rows
    return rows + 4 * (_count(query) + _count(key) + _count(value))


#: Up to so many indices, the gradient of an embedding is added up without sorting them.
_UNSORTED = 3072
_ROWS_PER_THREAD = 10


def _embedding_backward(call: Call) -> int:
    """``EmbeddingBackwardKernel.cu``: the indices sorted, with their places, and sums of segments of them in fp32."""
    gradient, indices = _tensors(call)[:2]
    count, width = _count(indices), gradient.size[-1]
    if count <= _UNSORTED:
        return 0
    weights = int(call.args[2])
    segments = count // _ROWS_PER_THREAD + min(count, weights)
    return 4 * count * indices.dtype.itemsize + segments * (-(-width // 32) * 32) * 4


def _sorting(call: Call) -> int:
    """cub's radix sort works on a second copy of what it sorts and of the places."""
    spec = _tensors(call)[0]
    return 2 * _count(spec) * (spec.dtype.itemsize + 8)


_WORKSPACES: Mapping[str, Callable[[Call], int]] = {
    "aten._scaled_dot_product_flash_attention_backward.default": _flash_backward,
    "aten._scaled_dot_product_efficient_attention_backward.default": _efficient_backward,
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.sort.default": _sorting,
    "aten.sort.stable": _sorting,
}
