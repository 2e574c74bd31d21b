"""How precisely libraries compute with float32 numbers: TF32 and bfloat16 are faster, with other bits."""

from __future__ import annotations

from typing import Any


def fp32_precision(**switches: Any) -> str:
    """Return the settings of these switches of `torch.backends`, each by its name.

    Only the switches themselves: `torch.get_float32_matmul_precision` raises once one of them was set directly.
    """
    chosen = {name: switch.fp32_precision for name, switch in switches.items()}
    # "none": neither this switch nor one above it was set, which is full precision.
    return " ".join(f"{name} {'ieee' if precision == 'none' else precision}" for name, precision in chosen.items())
