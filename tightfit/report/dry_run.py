"""The findings of ``--dry-run``: a planned run, as plain data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightfit.device.budget import Budget
from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.records import Plan, Verdict
from tightfit.report.plan_table import format_plan
from tightfit.report.text import format_gaps
from tightfit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """A run that was prepared and not begun."""

    model: str
    parameters: int
    trained_parameters: int
    task: str
    data: str
    held_out_samples: int
    microbatch: str
    """Shapes and dtypes of one."""
    microbatches: int
    """Per optimizer step."""
    first_step: int
    steps: int
    steps_per_epoch: int
    run_folder: str
    budget: Budget
    plan: Plan
    verdict: Verdict
    """Of one planned step."""

    @property
    def step_ms(self) -> float:
        """Measured time of a planned step."""
        return self.verdict.step_ms

    @property
    def estimated_seconds(self) -> float:
        """Time of the steps alone, without evaluations and checkpoints."""
        return (self.steps - self.first_step) * self.step_ms / 1e3

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        names = (
            "model", "parameters", "trained_parameters", "task", "data", "held_out_samples", "microbatch",
            "microbatches", "first_step", "steps", "steps_per_epoch", "run_folder", "step_ms", "estimated_seconds",
        )  # fmt: skip
        plan = self.plan
        return {
            **{name: getattr(self, name) for name in names},
            "budget_bytes": self.budget.total_bytes,
            "beside_bytes": self.budget.beside_step_bytes,
            "predicted_peak_bytes": plan.predicted_peak_bytes + self.budget.beside_step_bytes,
            "plain_peak_bytes": plan.plain_peak_bytes + self.budget.beside_step_bytes,
            "overhead_ratio": plan.overhead_ratio,
            "ok": self.verdict.ok,
            "compared_share": self.verdict.compared_share,
            "parts_of_peak": parts_of_peak(plan.breakdown, plan.peak_where),
        }


def format_dry_run(found: DryRun) -> str:
    """Format the planned run as text."""
    plan = found.plan
    frozen = found.parameters - found.trained_parameters
    parts = format_parts(parts_of_peak(plan.breakdown, plan.peak_where))
    split = f", {found.microbatches} of them a step" if found.microbatches > 1 else ""
    beside_bytes = found.budget.beside_step_bytes
    beside = f" + {format_bytes(beside_bytes)} beside the step" if beside_bytes else ""
    return "\n".join(
        [
            f"model   {found.model}: {found.parameters:,} parameters{f', {frozen:,} of them frozen' if frozen else ''}",
            f"task    {found.task}; held out for evaluation: {found.held_out_samples:,} samples",
            f"data    {found.data}",
            f"batch   {found.microbatch}{split}",
            format_plan(plan),
            f"        peak at {plan.peak_where}: {parts}{beside}",
            *format_gaps(found.verdict),
            f"steps   {found.first_step} of {found.steps} done, {found.steps_per_epoch} an epoch; "
            f"{found.step_ms:.0f} ms each, about {format_seconds(found.estimated_seconds)} in all",
            f"run     {found.run_folder}; nothing was written",
        ]
    )


def format_seconds(seconds: float) -> str:
    """Format a duration.

    >>> format_seconds(3725)
    '1 h 2 min'
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
