"""``--precision``: what forward computes in. Weights and optimizer state stay 32-bit floats."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tightfit.device.registry import KINDS, device_for
from tightfit.errors import UnsupportedInput

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype for `torch.autocast`; None: none.

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


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler that fp16 needs, so that small gradients do not become zero; None where none is needed."""
    return torch.amp.GradScaler(device_for(device).kind) if precision == "fp16" else None


def scaler_state(scaler: torch.amp.GradScaler | None) -> dict[str, Any]:
    """For a checkpoint."""
    return scaler.state_dict() if scaler is not None else {}
