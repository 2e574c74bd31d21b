"""Logged steps of a run: shown to people, and written to its ``metrics.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightfit.installation.applied import Applied
from tightfit.report.reporter import Reporter
from tightfit.report.step_report import StepReport
from tightfit.report.text import finite_or_none
from tightfit.train.evaluation import Evaluation
from tightfit.train.run_metrics import MetricsFile
from tightfit.train.step_meter import MeasuredStep
from tightfit.train.workload import Workload


@dataclass(kw_only=True)
class StepLog:
    """Logs steps to the reporter and the metrics file."""

    work: Workload
    applied: Applied
    total_steps: int
    reporter: Reporter
    metrics: MetricsFile | None
    """None: another process writes them."""

    def add(self, step: int, *, lr: float, measured: MeasuredStep, evaluation: Evaluation | None) -> None:
        """Log step ``step`` (the first is 1)."""
        order, plan = self.work.order, self.applied.active_plan
        report = StepReport(
            step=step,
            total_steps=self.total_steps,
            epoch=order.epoch_of(step - 1),
            loss=measured.loss,
            lr=lr,
            step_ms=measured.step_ms,
            samples_per_second=len(order.indices(step - 1)) / measured.step_ms * 1000,
            memory_now_bytes=measured.resident_bytes,
            peak_bytes=measured.peak_bytes,
            budget_bytes=self.work.budget.total_bytes,
            recompute_ratio=0.0 if plan is None else 1 - plan.plain_step_ms / max(plan.predicted_step_ms, 1e-9),
            gradient_norm=measured.gradient_norm,
            evaluation=None if evaluation is None else evaluation.metrics,
        )
        self.reporter.step(report)
        if self.metrics is not None:
            self.metrics.add(_metrics_line(report, evaluation))


def _metrics_line(report: StepReport, evaluation: Evaluation | None) -> dict[str, Any]:
    names = (
        "step", "epoch", "loss", "lr", "step_ms", "peak_bytes", "budget_bytes", "samples_per_second",
        "memory_now_bytes", "recompute_ratio",
    )  # fmt: skip
    line: dict[str, Any] = {name: finite_or_none(getattr(report, name)) for name in names}
    if report.gradient_norm is not None:
        line["gradient_norm"] = finite_or_none(report.gradient_norm)
    if evaluation is not None:
        metrics = {name: finite_or_none(value) for name, value in evaluation.metrics.items()}
        line["eval"] = {**metrics, "samples": evaluation.samples, "peak_bytes": evaluation.peak_bytes}
    return line
