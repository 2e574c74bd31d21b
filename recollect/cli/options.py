"""The settings of each command."""

from __future__ import annotations

from dataclasses import dataclass

from recollect.errors import UnsupportedInput
from recollect.train import TrainConfig, WorkConfig


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """`recollect train`."""

    json: bool = False
    """Print one JSON document to stdout instead of text for people"""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(WorkConfig):
    """`recollect plan`."""

    output: str | None = None
    """Write the plan to this JSON file"""
    json: bool = False
    """Print one JSON document to stdout instead of text for people"""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(WorkConfig):
    """`recollect verify`."""

    plan: str | None = None
    """Verify this plan file instead of solving one for --memory"""
    steps: int = 3
    """Optimizer steps that are compared"""
    reference_memory: str = "auto"
    """What the plain step may use for comparison (default: what is free); where it needs more, regions are compared"""
    json: bool = False
    """Print one JSON document to stdout instead of text for people"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("steps")
        if self.plan is not None and self.memory != "auto":
            raise UnsupportedInput(
                f"both a plan file ({self.plan}) and a budget ({self.memory}) are given, but a plan has its own "
                f"budget. Give one of --plan and --memory."
            )


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """`recollect models` and `recollect datasets`."""

    json: bool = False
    """Print one JSON document to stdout instead of text for people"""
