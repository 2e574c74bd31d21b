"""What a budget as people write it stands for on a device: ``8GiB``, ``8GB``, ``75%``, ``auto``, or bytes."""

from __future__ import annotations

import re

import torch

from tightfit.device.registry import device_for
from tightfit.errors import UnsupportedInput
from tightfit.units import format_bytes, parse_bytes

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def resolve_budget(
    budget: int | str, device: torch.device, *, name: str = "the budget", held_bytes: int | None = None
) -> int:
    """Return the bytes that `budget` stands for.

    Args:
        budget: a size, a share of all the device's memory, or ``auto``: what is free there now, and what this process
            holds there already.
        device: whose memory.
        name: what messages call it, for example a flag.
        held_bytes: for ``auto``, what this process holds already; by default what PyTorch's allocator holds on to.

    Raises:
        UnsupportedInput: not a size, or more than the device has.
    """
    where = device_for(device)
    total_bytes = where.capacity_bytes()
    if isinstance(budget, str) and budget.strip().lower() == "auto":
        if held_bytes is None:
            held_bytes = where.reserved_bytes()
        return min(where.free_bytes() + held_bytes, total_bytes)
    percent = _PERCENT.fullmatch(budget) if isinstance(budget, str) else None
    try:
        size_bytes = int(total_bytes * float(percent[1]) / 100) if percent else parse_bytes(budget)
    except ValueError:
        size_bytes = 0
    if size_bytes <= 0:
        raise UnsupportedInput(
            f"{name} {budget!r} is not a memory size. Write it like 8GiB, 8GB or 512MiB, as a share of the device's "
            f"memory like 75%, or auto."
        )
    if size_bytes > total_bytes:
        raise UnsupportedInput(
            f"{name} {budget} is {format_bytes(size_bytes)}, but the device {device} has only "
            f"{format_bytes(total_bytes)}. Give at most that, e.g. 90%, or auto for what is free."
        )
    return size_bytes
