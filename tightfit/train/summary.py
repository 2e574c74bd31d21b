"""What a run ends with: the figures a sceptic asks for, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightfit.records import Plan, Verdict
from tightfit.train.evaluation import Evaluation
from tightfit.train.reporter import format_metrics
from tightfit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A finished run."""

    plan: Plan
    verdict: Verdict
    """Of a real step of this very model, run before the training."""
    budget_bytes: int
    measured_peak_bytes: int
    """The highest of all measured steps and evaluations."""
    mismatched_steps: int
    """In which a region ran other operations than its plan says."""
    beside_bytes: int
    """Of the budget: held beside the step (the moving average of the weights, the batch's other parts)."""
    first_step: int
    """Steps that were done before this process began."""
    steps: int
    stopped_early: bool
    """Before all steps were done, because evaluations no longer improved."""
    evaluation: Evaluation | None
    """The last one; None where nothing is held out."""
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

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        verdict = self.verdict
        return {
            "run_folder": self.run_folder,
            "model_file": self.model_file,
            "steps": self.steps,
            "first_step": self.first_step,
            "stopped_early": self.stopped_early,
            "eval": None if self.evaluation is None else self.evaluation.metrics,
            "best_metric": None if self.best is None else self.best_metric,
            "best": self.best,
            "best_step": self.best_step,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "processes": self.processes,
            "budget_bytes": self.budget_bytes,
            "predicted_peak_bytes": self.plan.predicted_peak_bytes + self.beside_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "mismatched_steps": self.mismatched_steps,
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
        }


def format_plan(plan: Plan) -> str:
    """What was decided, in two or three lines."""
    planned = [plan.recipes[region.recipe] for region in plan.regions if region.recipe >= 0]
    peaks = (
        f"predicted peak {format_bytes(plan.predicted_peak_bytes)} of a budget of {format_bytes(plan.budget_bytes)} "
        f"(plain {format_bytes(plan.plain_peak_bytes)}; {format_bytes(plan.baseline_bytes)} of it are parameters, "
        f"gradients, optimizer state and batch)"
    )
    if not planned:
        return f"plan    nothing is recomputed: the plain step fits\n        {peaks}"
    dropped_bytes = sum(recipe.dropped_bytes for recipe in planned)
    nested = (
        "\n        the budget is below one level of recomputation: what passes between regions is recomputed, too, "
        "some of it several times"
    )
    return (
        f"plan    {len(planned)} of {len(plan.regions)} regions recompute {format_bytes(dropped_bytes)}, predicted "
        f"slowdown {plan.overhead_ratio:+.1%}\n        {peaks}{nested if plan.shared_tapes else ''}"
    )


def format_summary(summary: RunSummary) -> str:
    """The end of a run, for people."""
    plan, verdict = summary.plan, summary.verdict
    rows = [
        (
            "plain step",
            f"peak {format_bytes(verdict.plain_peak_bytes)} ({verdict.plain_peak_source}), "
            f"{verdict.plain_step_ms:.0f} ms ({verdict.plain_step_source})",
        ),
        (
            "this run",
            f"peak {format_bytes(summary.measured_peak_bytes)} (measured), "
            f"{format_bytes(plan.predicted_peak_bytes + summary.beside_bytes)} (predicted), {verdict.step_ms:.0f} ms",
        ),
        (
            "budget",
            f"{format_bytes(summary.budget_bytes)}, {_share(summary.budget_bytes, verdict.plain_peak_bytes)}; "
            f"{'kept' if summary.measured_peak_bytes <= summary.budget_bytes else 'EXCEEDED'}",
        ),
        *_off_plan(summary),
        ("slowdown", _slowdown(plan, verdict)),
        ("gradients", _equal(verdict, verdict.gradients_equal)),
        ("buffers", _equal(verdict, verdict.buffers_equal)),
        (
            "loss",
            f"{summary.loss_before:.4f} before, {summary.loss_after:.4f} after {summary.steps} steps "
            f"(first batch, without dropout){'; stopped early' if summary.stopped_early else ''}",
        ),
        *_judged(summary),
        ("run folder", summary.run_folder),
    ]
    return "\n".join(f"  {name:<11} {text}" for name, text in rows)


def _off_plan(summary: RunSummary) -> list[tuple[str, str]]:
    count = summary.mismatched_steps
    if not count:
        return []
    steps = "step" if count == 1 else "steps"
    return [("off plan", f"{count} {steps} ran other operations than planned, and recomputed all that is safe there")]


def _judged(summary: RunSummary) -> list[tuple[str, str]]:
    evaluation = summary.evaluation
    if evaluation is None:
        return []
    rows = [("held out", f"{format_metrics(evaluation.metrics)} ({evaluation.samples:,} samples)")]
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
        # A measured time over a predicted one would say more about the machine than about the plan.
        return f"{plan.overhead_ratio:+.1%} (predicted: the plain step was not run)"
    return f"{verdict.overhead_ratio:+.1%} (measured)"


def _equal(verdict: Verdict, equal: bool | None) -> str:
    if equal is None:
        return "not compared: the plain step does not fit; allow it more with --reference-memory"
    how = ", compared region by region" if verdict.method == "per-region" else ""
    return f"bit for bit those of the plain step{how}" if equal else f"NOT EQUAL to those of the plain step{how}"
