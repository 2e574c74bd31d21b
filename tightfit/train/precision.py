"""``--precision``: what forward computes in. Weights and optimizer state stay 32-bit floats."""

from __future__ import annotations

from typing import Literal

import torch

from tightfit.device.registry import KINDS, device_for
from tightfit.errors import UnsupportedInput

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the dtype for `torch.autocast`; None: no autocast.

    Raises:
        UnsupportedInput: the device cannot train in it.
    """
    if precision == "fp16" and not device_for(device).trains_in_fp16:
        raise UnsupportedInput(
            f"--precision fp16 was asked for on {device}, where it is slower than fp32 and loses small gradients. "
            f"Use it on {' or '.join(kind.label for kind in KINDS if kind.trains_in_fp16)}, or write --precision bf16 "
            f"or fp32."
        )
    return _AUTOCAST[precision]


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler: with fp16 it keeps small gradients from becoming zero, otherwise it does nothing."""
    return torch.amp.GradScaler(device_for(device).kind, enabled=precision == "fp16")
