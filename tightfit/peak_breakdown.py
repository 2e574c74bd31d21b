"""What a peak consists of, in the words of people who train models.

A leaf besides `units`: errors use it, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from tightfit.units import format_bytes

#: In the order in which they are shown.
PARTS = (
    "parameters",
    "gradients",
    "optimizer state and temporaries",
    "values kept",
    "replay transient",
    "other",
)


def parts_of_peak(breakdown: Mapping[str, int], where: str) -> dict[str, int]:
    """The parts of a peak, which add up to it.

    Args:
        breakdown: a plan's or simulation's bytes at the moment of the peak.
        where: when that is; during the optimizer's step, what is neither parameter, gradient nor state is its own.

    >>> parts = parts_of_peak({"parameters": 8, "batch": 1, "activations": 5, "replay": 2}, "backward of layers.0#0")
    >>> {name: size for name, size in parts.items() if size}
    {'parameters': 8, 'values kept': 5, 'replay transient': 2, 'other': 1}
    """
    parts = dict.fromkeys(PARTS, 0)
    in_optimizer = where == "optimizer step"
    for name, size in breakdown.items():
        if name in ("parameters", "gradients"):
            parts[name] += size
        elif name == "optimizer_state" or (in_optimizer and name in ("activations", "operation_scratch")):
            parts["optimizer state and temporaries"] += size
        elif name == "activations":
            parts["values kept"] += size
        elif name == "replay":
            parts["replay transient"] += size
        else:
            parts["other"] += size
    return parts


def format_parts(parts: Mapping[str, int]) -> str:
    """The parts that are not empty, in a line: ``parameters 8.0 MiB + values kept 5.0 MiB``."""
    shown = [f"{name} {format_bytes(size)}" for name, size in parts.items() if size]
    return " + ".join(shown) if shown else "nothing"
