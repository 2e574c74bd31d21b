"""Break a peak down into the parts that users know."""

from __future__ import annotations

from collections.abc import Mapping

from tightfit.units import format_bytes

#: Each part's key in JSON documents, with the words that users read, in the order in which they are shown.
_LABELS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer state and temporaries": "optimizer state and temporaries",
    "reached by the loss": "what only the loss reaches",
    "values kept": "activations kept",
    "replay transient": "recomputed activations",
    "context": "the device's context and libraries",
    "other": "other",
}
PARTS = tuple(_LABELS)


def parts_of_peak(breakdown: Mapping[str, int], where: str) -> dict[str, int]:
    """Sort a peak's components into the parts of `PARTS`, in bytes; the parts add up to the peak.

    Args:
        breakdown: bytes by component at the moment of the peak, of a plan or a simulation.
        where: the moment of the peak. During ``optimizer step``, activations and workspace are the optimizer's
            temporaries.

    >>> parts = parts_of_peak({"parameters": 8, "batch": 1, "activations": 5, "replay": 2}, "backward of layers.0#0")
    >>> {name: size for name, size in parts.items() if size}
    {'parameters': 8, 'values kept': 5, 'replay transient': 2, 'other': 1}
    """
    parts = dict.fromkeys(PARTS, 0)
    in_optimizer = where == "optimizer step"
    for name, size in breakdown.items():
        if name in ("parameters", "gradients", "context"):
            parts[name] += size
        elif name == "optimizer_state" or (in_optimizer and name in ("activations", "workspace")):
            parts["optimizer state and temporaries"] += size
        elif name == "reached":
            parts["reached by the loss"] += size
        elif name == "activations":
            parts["values kept"] += size
        elif name == "replay":
            parts["replay transient"] += size
        else:
            parts["other"] += size
    return parts


def format_parts(parts: Mapping[str, int]) -> str:
    """Format the parts that are not empty: ``parameters 8.0 MiB + activations kept 5.0 MiB``."""
    shown = [f"{_LABELS[name]} {format_bytes(size)}" for name, size in parts.items() if size]
    return " + ".join(shown) if shown else "nothing"
