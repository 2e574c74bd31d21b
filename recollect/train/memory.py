"""``--memory`` and ``--device`` as people write them."""

from __future__ import annotations

import re

import torch

from recollect.errors import UnsupportedInput
from recollect.meter import device_memory_bytes, free_memory_bytes
from recollect.units import format_bytes, parse_bytes

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def resolve_device(text: str) -> torch.device:
    """The device that ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` names."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UnsupportedInput(f"{text!r} names no device. Write --device cpu, cuda, cuda:1 or auto.") from None
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedInput(
            f"the device {text!r} is neither a CPU nor a CUDA device, and recollect can measure no other. "
            f"Write --device cpu or cuda."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedInput(
            f"the device {text!r} was asked for, but this machine offers {torch.cuda.device_count()} CUDA devices to "
            f"PyTorch {torch.__version__}. Write --device auto to take what there is."
        )
    return device


def resolve_memory(text: str, device: torch.device, *, flag: str = "--memory") -> int:
    """Bytes that ``8GiB``, ``75%`` or ``auto`` stand for on ``device``.

    Raises:
        UnsupportedInput: not a size, or more than the device has.
    """
    total_bytes = device_memory_bytes(device)
    if text.strip().lower() == "auto":
        # What this process holds on a GPU already is its own to use; on a CPU before the run it is next to nothing.
        own_bytes = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        return min(free_memory_bytes(device) + own_bytes, total_bytes)
    percent = _PERCENT.fullmatch(text)
    try:
        size_bytes = int(total_bytes * float(percent[1]) / 100) if percent else parse_bytes(text)
    except ValueError:
        size_bytes = 0
    if size_bytes <= 0:
        raise UnsupportedInput(
            f"{flag} {text!r} is not a memory size. Write it like 8GiB, 8GB or 512MiB, as a share of the device's "
            f"memory like 75%, or auto."
        )
    if size_bytes > total_bytes:
        raise UnsupportedInput(
            f"{flag} {text} is {format_bytes(size_bytes)}, but the device {device} has only "
            f"{format_bytes(total_bytes)}. Give at most that, e.g. {flag} 90%, or auto for what is free."
        )
    return size_bytes
