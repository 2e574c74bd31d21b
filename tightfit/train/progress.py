"""How a run went so far: kept in its checkpoints, so that a resumed run decides as an uninterrupted one.

A leaf: plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class Progress:
    """See the module."""

    loss_before: float
    """On the run's first batch, before its first step."""
    best: float | None = None
    """The best value so far of the metric that decides; None before the first evaluation."""
    best_step: int = 0
    """When it was reached."""
    evaluations_since_best: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Progress:
        """What `to_json` gave."""
        return cls(**state)
