"""What would make a step fit, as a ranked list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tightfit.units import format_bytes


class _Lever(Protocol):
    """`cli.levers.Lever`."""

    @property
    def flags(self) -> str: ...
    @property
    def changes(self) -> str: ...
    @property
    def fit(self) -> str: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def smallest_bytes(self) -> int: ...
    @property
    def sample_ms(self) -> float: ...


_FITS = {"plain": "fits as it is", "planned": "fits with recomputation", "no": "does not fit"}
_CHANGES = {"nothing": "the same numbers", "rounding": "sums in another order", "training": "another training"}


def format_levers(levers: Sequence[_Lever], budget_bytes: int) -> str:
    """Format a line for each lever, the best first."""
    if not levers:
        return "levers  none is needed: the step fits as it is, and nothing that was tried takes less"
    wide = max(len(lever.flags) for lever in levers)
    lines = [f"levers  within {format_bytes(budget_bytes)}, each measured and planned, best first; times are estimates"]
    for lever in levers:
        lines.append(
            f"        {lever.flags:<{wide}}  {_FITS[lever.fit]}: peak {format_bytes(lever.peak_bytes)}, from "
            f"{format_bytes(lever.smallest_bytes)}; {lever.sample_ms:.3g} ms per sample; {_CHANGES[lever.changes]}"
        )
    return "\n".join(lines)
