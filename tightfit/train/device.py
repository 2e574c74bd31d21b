"""``--device``: reading what people write."""

from __future__ import annotations

import torch

from tightfit.errors import UnsupportedInput


def resolve_device(text: str) -> torch.device:
    """Return the device that ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` names."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UnsupportedInput(f"{text!r} names no device. Write --device cpu, cuda, cuda:1 or auto.") from None
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedInput(
            f"the device {text!r} is neither a CPU nor a CUDA device, and tightfit can measure no other. "
            f"Write --device cpu or cuda."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedInput(
            f"the device {text!r} was asked for, but this machine offers {torch.cuda.device_count()} CUDA devices to "
            f"PyTorch {torch.__version__}. Write --device auto to take what there is."
        )
    return device
