"""What to raise where a saved tensor is no longer what backward needs."""

from __future__ import annotations

import torch


class CannotRebuild(RuntimeError):
    """A saved tensor cannot be recomputed: what it is recomputed from has changed."""


def modified_error(dtype: torch.dtype, shape: torch.Size, version: int, expected: int) -> RuntimeError:
    """Return what plain autograd raises when a saved tensor was written afterwards."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"{dtype} {list(shape)} is at version {version}; expected version {expected} instead. Plain PyTorch refuses "
        "this too: do not modify a tensor in place after a differentiable operation used it."
    )


def changed_error(source: torch.Tensor, how: str) -> CannotRebuild:
    """Return what to raise when a tensor that recomputation reads is not what it was; `how` it was modified."""
    return CannotRebuild(
        "tightfit cannot rebuild a saved tensor: a tensor that its recomputation reads "
        f"({source.dtype} {list(source.shape)}) was modified {how}. Gradients would be wrong. "
        "Do not modify it before backward, or leave the module that modifies or reads it untouched: "
        "fit(..., exclude=module), or a pattern of its path."
    )
