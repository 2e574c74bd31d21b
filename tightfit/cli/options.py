"""The settings of each command."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.errors import UnsupportedInput
from tightfit.solver.frontier import check_points
from tightfit.train import TrainConfig, WorkConfig


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """`tightfit train`."""

    TITLE = "output"

    dry_run: bool = False
    """Say what would be done, in which memory and about how long, and write nothing"""
    quiet: bool = False
    """Show the summary at the end only"""
    verbose: bool = False
    """Show what planning does, too"""
    json: bool = False
    """Print one JSON document to stdout instead of text for people"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quiet and self.verbose:
            raise UnsupportedInput(
                "both --quiet and --verbose are given, but they ask for the opposite of each other. Give one of them."
            )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(WorkConfig):
    """`tightfit plan`."""

    TITLE = "output"

    output: str | None = None
    """Write the plan to this JSON file"""
    json: bool = False
    """Print one JSON document to stdout instead of text for people"""


@dataclass(frozen=True, kw_only=True)
class FrontierOptions(WorkConfig):
    """`tightfit frontier`."""

    TITLE = "output"

    memory: str = "auto"
    """A budget to mark in the curve: 8GiB, 8GB, 75% of the device's memory; auto marks none"""
    points: int = 20
    """Budgets to solve for, from the smallest that runs to the plain peak"""
    output: str | None = None
    """Draw the curve into this file: .png, .svg or .pdf"""
    peers: str | None = None
    """Draw the points of other methods, too, from this JSON file"""
    json: bool = False
    """Print one JSON document to stdout instead of text for people"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_points(self.points)
        if self.peers is not None and self.output is None:
            raise UnsupportedInput(
                f"a file of peers ({self.peers}) is given, but they are only drawn, and no plot is asked for. "
                f"Add --output frontier.png, or leave --peers out."
            )

    @property
    def marks_budget(self) -> bool:
        """Whether --memory names a budget."""
        return self.memory.strip().lower() != "auto"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(WorkConfig):
    """`tightfit verify`."""

    TITLE = "output"

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
        self._require(1, "steps")
        if self.plan is not None and self.memory != "auto":
            raise UnsupportedInput(
                f"both a plan file ({self.plan}) and a budget ({self.memory}) are given, but a plan has its own "
                f"budget. Give one of --plan and --memory."
            )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """`tightfit report`."""

    run_folder: str | None = None
    """The run's folder, ROOT_PATH/DATASET/MARK; may stand alone, without the flag"""
    output: str | None = None
    """Write the page to this file (default: report.html in the run's folder)"""
    json: bool = False
    """Print one JSON document to stdout instead of text for people"""

    def __post_init__(self) -> None:
        if self.run_folder is None:
            raise UnsupportedInput(
                "no run folder is given, so there is nothing to report on. "
                "Name it: tightfit report ROOT_PATH/DATASET/MARK."
            )


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """`tightfit models` and `tightfit datasets`."""

    json: bool = False
    """Print one JSON document to stdout instead of text for people"""
