"""The summary of a finished run: its figures, each with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.device.budget import Budget
from tightfit.records import Plan, Verdict
from tightfit.report.text import finite_or_none, format_metrics
from tightfit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A finished run."""

    plan: Plan
    verdict: Verdict
    """Of a real step of this model, run before the training."""
    budget: Budget
    measured_peak_bytes: int
    """The highest of all measured steps and evaluations."""
    mismatched_steps: int
    """Steps in which a region ran other operations than planned."""
    first_step: int
    """Steps that were done before this process began."""
    skipped_steps: int
    """Steps of this process that left the weights alone, because something in them was not finite."""
    steps: int
    stopped_early: bool
    """Before all steps were done, because evaluations no longer improved."""
    evaluation: Mapping[str, float] | None
    """Metrics of the last evaluation; None where nothing is held out."""
    evaluation_samples: int
    best_metric: str
    """The metric that decides which checkpoint is the best."""
    best: float | None
    best_step: int
    loss_before: float
    """On the run's first batch, before the run's first step."""
    loss_after: float
    """On the same batch, after the last step."""
    processes: int = 1
    run_folder: str
    model_file: str

    @property
    def predicted_peak_bytes(self) -> int:
        """Predicted for the step, with what is held beside it."""
        return self.plan.predicted_peak_bytes + self.budget.beside_step_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        verdict = self.verdict
        return {
            "run_folder": self.run_folder,
            "model_file": self.model_file,
            "steps": self.steps,
            "first_step": self.first_step,
            "stopped_early": self.stopped_early,
            "eval": self.evaluation,
            "best_metric": None if self.best is None else self.best_metric,
            "best": self.best,
            "best_step": self.best_step,
            "loss_before": finite_or_none(self.loss_before),
            "loss_after": finite_or_none(self.loss_after),
            "processes": self.processes,
            "budget_bytes": self.budget.total_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "mismatched_steps": self.mismatched_steps,
            "skipped_steps": self.skipped_steps,
            "plain_peak_bytes": verdict.plain_peak_bytes,
            "plain_peak_source": verdict.plain_peak_source,
            "plain_step_ms": verdict.plain_step_ms,
            "plain_step_source": verdict.plain_step_source,
            "step_ms": verdict.step_ms,
            "overhead_ratio": verdict.overhead_ratio,
            "loss_equal": verdict.loss_equal,
            "gradients_equal": verdict.gradients_equal,
            "buffers_equal": verdict.buffers_equal,
            "rng_equal": verdict.rng_equal,
            "ok": verdict.ok,
            "compared_share": verdict.compared_share,
        }


def format_summary(summary: RunSummary) -> str:
    """Format the summary as text."""
    plan, verdict = summary.plan, summary.verdict
    budget_bytes = summary.budget.total_bytes
    rows = [
        (
            "plain step",
            f"peak {format_bytes(verdict.plain_peak_bytes)} ({verdict.plain_peak_source}), "
            f"{verdict.plain_step_ms:.0f} ms ({verdict.plain_step_source})",
        ),
        (
            "this run",
            f"peak {format_bytes(summary.measured_peak_bytes)} (measured), "
            f"{format_bytes(summary.predicted_peak_bytes)} (predicted), {verdict.step_ms:.0f} ms",
        ),
        (
            "budget",
            f"{format_bytes(budget_bytes)}, {_share(budget_bytes, verdict.plain_peak_bytes)}; "
            f"{'kept' if summary.measured_peak_bytes <= budget_bytes else 'EXCEEDED'}",
        ),
        *_off_plan(summary),
        *_skipped(summary),
        ("slowdown", _slowdown(plan, verdict)),
        ("gradients", _equal(verdict, verdict.gradients_equal)),
        ("buffers", _equal(verdict, verdict.buffers_equal)),
        (
            "loss",
            f"{summary.loss_before:.4f} before, {summary.loss_after:.4f} after {summary.steps} steps "
            f"(first batch, without dropout){'; stopped early' if summary.stopped_early else ''}",
        ),
        *_evaluated(summary),
        ("run folder", summary.run_folder),
    ]
    return "\n".join(f"  {name:<11} {text}" for name, text in rows)


def _off_plan(summary: RunSummary) -> list[tuple[str, str]]:
    count = summary.mismatched_steps
    if not count:
        return []
    steps = "step" if count == 1 else "steps"
    return [("off plan", f"{count} {steps} ran other operations than planned, and recomputed all that is safe there")]


def _skipped(summary: RunSummary) -> list[tuple[str, str]]:
    count = summary.skipped_steps
    if not count:
        return []
    taken = summary.steps - summary.first_step
    return [("skipped", f"{count} of {taken} steps, whose loss or gradients were not finite; see log.txt")]


def _evaluated(summary: RunSummary) -> list[tuple[str, str]]:
    if summary.evaluation is None:
        return []
    rows = [("held out", f"{format_metrics(summary.evaluation)} ({summary.evaluation_samples:,} samples)")]
    if summary.best is not None and summary.best_step != summary.steps:
        name = summary.best_metric.replace("_", " ")
        rows.append(("best", f"{name} {summary.best:.4f} at step {summary.best_step} (checkpoints/best)"))
    return rows


def _share(budget_bytes: int, plain_peak_bytes: int) -> str:
    if budget_bytes >= plain_peak_bytes:
        return "which the plain step fits into"
    return f"{budget_bytes / plain_peak_bytes:.0%} of the plain peak"


def _slowdown(plan: Plan, verdict: Verdict) -> str:
    if plan.is_plain:
        return "none: nothing is recomputed"
    if verdict.plain_step_source == "predicted":
        # A ratio of a measured and a predicted time would say more about the machine than about the plan.
        return f"{plan.overhead_ratio:+.1%} (predicted: the plain step was not run)"
    return f"{verdict.overhead_ratio:+.1%} (measured)"


def _equal(verdict: Verdict, equal: bool | None) -> str:
    if equal is None:
        return "not compared: the plain step does not fit; allow it more with --reference-memory"
    how = ", compared region by region" if verdict.method == "per-region" else ""
    how += f", {verdict.compared_share:.0%} of the gradients" if verdict.compared_share < 1 else ""
    return f"bit for bit those of the plain step{how}" if equal else f"NOT EQUAL to those of the plain step{how}"
