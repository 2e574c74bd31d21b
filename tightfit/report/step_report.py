"""A logged step of a training run, and its line of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tightfit.report.text import format_metrics
from tightfit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One logged step."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    step_ms: float
    samples_per_second: float
    memory_now_bytes: int
    """Resident after the step: parameters, gradients, optimizer state, batch."""
    peak_bytes: int
    """Measured during this step."""
    budget_bytes: int
    recompute_ratio: float
    """Predicted time of recomputation, as a share of the step."""
    gradient_norm: float | None = None
    """Before clipping; None: not clipped."""
    evaluation: Mapping[str, float] | None = None
    """Metrics of the evaluation after the step, if there was one."""


def format_step(report: StepReport) -> str:
    """Format a logged step in one line, and its evaluation in another."""
    line = (
        f"step {report.step}/{report.total_steps}  loss {report.loss:.4f}  lr {report.lr:.2e}  {format_rates(report)}  "
        f"memory: {format_memory(report)}"
    )
    if report.evaluation is None:
        return line
    return f"{line}\n  held out: {format_metrics(report.evaluation)}"


def format_rates(report: StepReport) -> str:
    """Format throughput and time of a logged step."""
    share = f" ({report.recompute_ratio:.0%} recomputing)" if report.recompute_ratio >= 0.005 else ""
    return f"{report.samples_per_second:.1f} samples/s  {report.step_ms:.0f} ms/step{share}"


def format_memory(report: StepReport) -> str:
    """Format the memory of a logged step."""
    return (
        f"now {format_bytes(report.memory_now_bytes)}, peak {format_bytes(report.peak_bytes)}, "
        f"budget {format_bytes(report.budget_bytes)}"
    )
