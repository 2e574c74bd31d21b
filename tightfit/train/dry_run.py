"""``--dry-run``: what a run would be, in which memory and about how long; nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.records import Plan
from tightfit.step.batch import describe_batch
from tightfit.train.config import TrainConfig
from tightfit.train.determinism import deterministic_algorithms
from tightfit.train.run import make_average, make_evaluator, plan_run, total_steps_of
from tightfit.train.run_folder import RunFolder
from tightfit.train.summary import format_plan
from tightfit.train.workload import build, resolve
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
    """Shapes and types of what runs at a time."""
    microbatches: int
    """In an optimizer step."""
    first_step: int
    steps: int
    steps_per_epoch: int
    run_folder: str
    budget_bytes: int
    beside_bytes: int
    """Of the budget: held beside the step."""
    plan: Plan
    step_ms: float
    """Measured, of one planned step."""

    @property
    def estimated_seconds(self) -> float:
        """Of the steps alone: without evaluations and checkpoints."""
        return (self.steps - self.first_step) * self.step_ms / 1e3

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        names = (
            "model", "parameters", "trained_parameters", "task", "data", "held_out_samples", "microbatch",
            "microbatches", "first_step", "steps", "steps_per_epoch", "run_folder", "budget_bytes", "beside_bytes",
            "step_ms", "estimated_seconds",
        )  # fmt: skip
        plan = self.plan
        return {
            **{name: getattr(self, name) for name in names},
            "predicted_peak_bytes": plan.predicted_peak_bytes + self.beside_bytes,
            "plain_peak_bytes": plan.plain_peak_bytes + self.beside_bytes,
            "overhead_ratio": plan.overhead_ratio,
            "parts_of_peak": parts_of_peak(plan.breakdown, plan.peak_where),
        }


def rehearse(config: TrainConfig) -> DryRun:
    """Prepare the run as `run` does, and do no step of it.

    Raises:
        UnsupportedInput, BudgetInfeasible: as `run`.
    """
    with deterministic_algorithms(config.deterministic):
        config, source = resolve(config)
        folder = RunFolder(config)
        checkpoint = folder.find_checkpoint(config.resume)
        work = build(config, source)
        evaluator = make_evaluator(config, source, work)
        average = make_average(config, work, {})
        total_steps = total_steps_of(config, work)
        first_step = min(checkpoint.step if checkpoint else 0, total_steps - 1)
        applied, beside_bytes = plan_run(config, work, average, first_step, total_steps)
        applied.remove()
        assert applied.verdict is not None  # fit has judged what it returns
        return DryRun(
            model=type(work.model).__name__,
            parameters=sum(parameter.numel() for parameter in work.model.parameters()),
            trained_parameters=sum(p.numel() for p in work.model.parameters() if p.requires_grad),
            task=work.task.name,
            data=work.data.description,
            held_out_samples=0 if evaluator is None else len(evaluator.samples),
            microbatch=describe_batch(work.microbatch(0)),
            microbatches=work.accumulation_steps,
            first_step=first_step,
            steps=total_steps,
            steps_per_epoch=work.order.steps_per_epoch,
            run_folder=str(folder.path),
            budget_bytes=work.budget_bytes,
            beside_bytes=beside_bytes,
            plan=applied.plan,
            step_ms=applied.verdict.step_ms,
        )


def format_dry_run(found: DryRun) -> str:
    """What a run would be, for people."""
    plan = found.plan
    frozen = found.parameters - found.trained_parameters
    parts = format_parts(parts_of_peak(plan.breakdown, plan.peak_where))
    split = f", {found.microbatches} of them a step" if found.microbatches > 1 else ""
    beside = f" + {format_bytes(found.beside_bytes)} beside the step" if found.beside_bytes else ""
    return "\n".join(
        [
            f"model   {found.model}: {found.parameters:,} parameters{f', {frozen:,} of them frozen' if frozen else ''}",
            f"task    {found.task}; held out for evaluation: {found.held_out_samples:,} samples",
            f"data    {found.data}",
            f"batch   {found.microbatch}{split}",
            format_plan(plan),
            f"        peak at {plan.peak_where}: {parts}{beside}",
            f"steps   {found.first_step} of {found.steps} done, {found.steps_per_epoch} an epoch; "
            f"{found.step_ms:.0f} ms each, about {format_seconds(found.estimated_seconds)} in all",
            f"run     {found.run_folder}; nothing was written",
        ]
    )


def format_seconds(seconds: float) -> str:
    """A time for people.

    >>> format_seconds(3725)
    '1 h 2 min'
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
