"""``--precision``: what forward computes in. Weights and optimizer state stay 32-bit floats."""

from __future__ import annotations

from typing import Literal

import torch

from tightfit.errors import UnsupportedInput

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the dtype for `torch.autocast`; None: no autocast.

    Raises:
        UnsupportedInput: the device cannot train in it.
    """
    if precision == "fp16" and device.type != "cuda":
        raise UnsupportedInput(
            f"--precision fp16 was asked for on {device}, where it is slower than fp32 and loses small gradients. "
            f"Use it on CUDA, or write --precision bf16 or fp32."
        )
    return _AUTOCAST[precision]


def make_scaler(precision: Precision) -> torch.amp.GradScaler:
    """Return the loss scaler: with fp16 it keeps small gradients from becoming zero, otherwise it does nothing."""
    return torch.amp.GradScaler("cuda", enabled=precision == "fp16")
