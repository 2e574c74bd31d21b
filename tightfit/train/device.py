"""``--device``: reading what people write."""

from __future__ import annotations

import torch

from tightfit.device.described.cards import card_named
from tightfit.device.registry import KINDS, device_named, preferred_kind
from tightfit.errors import UnsupportedInput


def resolve_device(text: str) -> torch.device:
    """Return the device that ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` names."""
    if (card := card_named(text)) is not None:
        raise UnsupportedInput(
            f"--device {text} names {card.title}, which is described, not here. Nothing can be run on it. Ask for a "
            "prediction (`tightfit plan`, `tightfit frontier`), or write --device cpu, cuda, cuda:1 or auto."
        )
    if text == "auto":
        return torch.device(preferred_kind().kind)
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UnsupportedInput(f"{text!r} names no device. Write --device cpu, cuda, cuda:1 or auto.") from None
    known = device_named(text)
    if known is None:
        raise UnsupportedInput(
            f"the device {text!r} is of a kind that tightfit cannot measure. "
            f"Write --device {' or '.join(kind.kind for kind in reversed(KINDS))}."
        )
    if not known.is_host and (device.index or 0) >= known.count():
        raise UnsupportedInput(
            f"the device {text!r} was asked for, but this machine offers {known.count()} {known.label} devices to "
            f"PyTorch {torch.__version__}. Write --device auto to take what there is."
        )
    return device
