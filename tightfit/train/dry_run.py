"""``--dry-run``: planning a run to see its memory and time; nothing is written."""

from __future__ import annotations

from tightfit.report.dry_run import DryRun
from tightfit.step.batch import describe_batch
from tightfit.train.config import TrainConfig
from tightfit.train.determinism import deterministic_algorithms
from tightfit.train.ema import MovingAverage
from tightfit.train.evaluation import make_evaluator
from tightfit.train.run_folder import RunFolder
from tightfit.train.run_plan import plan_run
from tightfit.train.workload import build, resolve


def rehearse(config: TrainConfig) -> DryRun:
    """Prepare and plan the run as `run` does, and take no step of it.

    Raises:
        UnsupportedInput, BudgetInfeasible: as `run`.
    """
    with deterministic_algorithms(config.deterministic):
        config, source = resolve(config)
        folder = RunFolder(config)
        folder.check_place()
        checkpoint = folder.find_checkpoint(config.resume)
        work = build(config, source)
        evaluator = make_evaluator(config, source, work)
        average = MovingAverage(work.model, config.ema_decay)
        total_steps = config.total_steps(work.order.steps_per_epoch)
        first_step = min(checkpoint.step if checkpoint else 0, total_steps - 1)
        applied, budget = plan_run(config, work, average, first_step, total_steps)
        applied.remove()
        assert applied.verdict is not None  # fit has verified what it returns
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
            budget=budget,
            plan=applied.plan,
            verdict=applied.verdict,
        )
