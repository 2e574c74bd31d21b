"""What to raise where a saved tensor is no longer what backward needs."""

from __future__ import annotations

import torch

from tightfit.errors import UnsupportedInput, first_line

#: How a tensor was modified that no version counter tells of.
WRITTEN_BEHIND = "behind PyTorch's back (for example through NumPy, by a kernel of an extension, or by BatchNorm)"


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


def other_kernel_error(operation: str, reason: str) -> CannotRebuild:
    """Return what to raise when an operation would not be replayed by the kernel that forward ran; `reason` why not."""
    return CannotRebuild(
        f"tightfit cannot rebuild a saved tensor: {reason}, and did not when forward ran {operation}. Gradients might "
        "have other bits. Set torch.backends.cudnn.benchmark and torch.autograd.set_multithreading_enabled before "
        "training, and leave them as they are from forward to backward."
    )


def other_call_error(dtype: torch.dtype, size: torch.Size, found: torch.Tensor | None) -> CannotRebuild:
    """Return what to raise when a module's second call has not saved what its first one had; `found` is what it has."""
    instead = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
    return CannotRebuild(
        f"tightfit cannot rebuild a saved tensor: a module that was called again in backward saved {instead} where its "
        f"first call had saved {dtype} {list(size)}. It is not the same computation twice. Leave the module untouched: "
        "fit(..., exclude=module), or a pattern of its path."
    )


def failed_call_error(error: Exception) -> CannotRebuild:
    """Return what to raise when a module's second call raises `error`, which its first one has not."""
    return CannotRebuild(
        f"tightfit cannot rebuild a saved tensor: a module that was called again in backward raised "
        f"{type(error).__name__} ({first_line(error)}), which its first call had not. It depends on something that is "
        "there in forward alone. Leave the module untouched: fit(..., exclude=module), or a pattern of its path."
    )


def captured_error() -> UnsupportedInput:
    """Return what to raise when a region in which a plan drops something is captured into a CUDA graph."""
    return UnsupportedInput(
        "the planned model is being captured into a CUDA graph. What a plan recomputes is decided while backward runs, "
        "and a graph runs the same kernels every time and asks nobody, so the budget would not hold. Capture the model "
        "without a plan (inside applied.paused(), or after applied.remove()), or train it without a graph."
    )
