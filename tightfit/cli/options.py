"""The settings of each command."""

from __future__ import annotations

from dataclasses import dataclass, field

from tightfit.errors import UnsupportedInput
from tightfit.solver.frontier import check_points
from tightfit.train import TrainConfig, WorkConfig


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """`tightfit train`."""

    TITLE = "output"

    dry_run: bool = False
    """Plan the run and report its memory and time, but do not train or write anything"""
    quiet: bool = False
    """Print only the summary at the end"""
    verbose: bool = False
    """Also print what planning does"""
    json: bool = False
    """Print one JSON document to stdout instead of text"""

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
    explain: bool = False
    """List every kind of region, and all that is kept whatever the budget, with the reason; for a GPU that is not here,
    also what else would make the step fit, each computed"""
    snapshot: str | None = None
    """Write the planned step as a snapshot of the allocator to this file, which pytorch.org/memory_viz opens"""
    fsdp: int = 1
    """Shard the model over so many GPUs that are not here, by FSDP2; --batch-size is of all of them"""
    json: bool = False
    """Print one JSON document to stdout instead of text"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "fsdp")


@dataclass(frozen=True, kw_only=True)
class FrontierOptions(WorkConfig):
    """`tightfit frontier`."""

    TITLE = "output"

    memory: str = "auto"
    """Budget to mark in the curve: 8GiB, 8GB, 8GiB+context, 75% of the device's memory; auto marks none"""
    points: int = 20
    """Number of budgets to solve for, from the smallest that runs to the plain peak"""
    output: str | None = None
    """Draw the curve into this file: .png, .svg or .pdf"""
    peers: str | None = None
    """Also draw the points of other methods from this JSON file"""
    json: bool = False
    """Print one JSON document to stdout instead of text"""

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
        """Whether --memory names a budget to mark."""
        return self.memory.strip().lower() != "auto"


@dataclass(frozen=True, kw_only=True)
class GrowOptions(WorkConfig):
    """`tightfit grow`."""

    TITLE = "output"

    most: int = 4096
    """Largest batch to try; --batch-size has no effect"""
    output: str | None = None
    """Draw the time per sample against the batch into this file: .png, .svg or .pdf"""
    json: bool = False
    """Print one JSON document to stdout instead of text"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "most")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(WorkConfig):
    """`tightfit verify`."""

    TITLE = "output"

    plan: str | None = None
    """Plan file to verify, instead of solving for --memory"""
    steps: int = 3
    """Optimizer steps to compare"""
    reference_memory: str = "auto"
    """Memory that the plain step may use (default: what is free); if it needs more, regions are compared one by one"""
    json: bool = False
    """Print one JSON document to stdout instead of text"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "steps")
        if self.plan is not None and self.memory != "auto":
            raise UnsupportedInput(
                f"both a plan file ({self.plan}) and a budget ({self.memory}) are given, but a plan has its own "
                f"budget. Give one of --plan and --memory."
            )


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """`tightfit explain`."""

    script: str | None = None
    """Training script to run until its first complete step; the flag itself may be left out"""
    memory: str = "auto"
    """Memory that there is for a step: 8GiB, 8GB, 75% of the device's; auto: what there was, where it ran out"""
    device: str | None = None
    """Also say whether the step would fit this GPU, which is not here: one of `tightfit devices`, cuda:24GiB"""
    json: bool = False
    """Print one JSON document to stdout instead of text"""
    arguments: tuple[str, ...] = field(default=(), metadata={"flag": False})
    """The script's own, all after its name."""

    def __post_init__(self) -> None:
        if self.script is None:
            raise UnsupportedInput(
                "no script is given, so there is no step to explain. Name it, with its arguments after it: "
                "tightfit explain train.py --its-flags."
            )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """`tightfit report`."""

    run_folder: str | None = None
    """Run folder, ROOT_PATH/DATASET/MARK; the flag itself may be left out"""
    output: str | None = None
    """Write the page to this file (default: report.html in the run folder)"""
    plots: str | None = None
    """Also draw each chart of the page into this folder, as PNG and SVG"""
    json: bool = False
    """Print one JSON document to stdout instead of text"""

    def __post_init__(self) -> None:
        if self.run_folder is None:
            raise UnsupportedInput(
                "no run folder is given, so there is nothing to report on. "
                "Name it: tightfit report ROOT_PATH/DATASET/MARK."
            )


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """`tightfit models`, `tightfit datasets`, `tightfit devices` and `tightfit doctor`."""

    json: bool = False
    """Print one JSON document to stdout instead of text"""
