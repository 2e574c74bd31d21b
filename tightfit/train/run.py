"""A training run: preparing it, running its loop, and finishing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import tightfit
from tightfit.device.budget import Budget
from tightfit.distributed.fsdp import is_sharded
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.report.plan_table import format_plan, format_table
from tightfit.report.reporter import Reporter
from tightfit.report.run_summary import RunSummary
from tightfit.report.text import format_gaps
from tightfit.train.checkpoint import Checkpoint, Retention
from tightfit.train.checkpoint_writer import CheckpointWriter, copy_room_bytes
from tightfit.train.config import TrainConfig
from tightfit.train.determinism import deterministic_algorithms
from tightfit.train.ema import MovingAverage
from tightfit.train.evaluation import Evaluator, loss_of_first_batch, make_evaluator
from tightfit.train.finiteness import FiniteGuard
from tightfit.train.loop import OptimizerStep, TrainingLoop
from tightfit.train.memory_limit import FILE as MEMORY_LIMIT
from tightfit.train.memory_limit import noted_limit
from tightfit.train.models import ModelSource
from tightfit.train.parallel.ddp import data_parallel
from tightfit.train.precision import make_scaler
from tightfit.train.progress import Progress
from tightfit.train.resume import Restored, end_of_run, identity_of, progress_of, restore, settle_sums
from tightfit.train.run_folder import RunFolder
from tightfit.train.run_lock import only_run_in
from tightfit.train.run_metrics import MetricsFile, import_tensorboard
from tightfit.train.run_plan import plan_run, unused_parameters_of
from tightfit.train.step_log import StepLog
from tightfit.train.step_meter import StepMeter
from tightfit.train.workload import Workload, build, resolve
from tightfit.units import format_bytes

#: Of the plan's table, before the first step.
_PLAN_LINES = 5


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The checked parts of a run, before anything is planned or written."""

    config: TrainConfig
    source: ModelSource
    work: Workload
    folder: RunFolder
    evaluator: Evaluator | None
    checkpoint: Checkpoint | None
    limit_bytes: int | None
    """What plans may hold in total, if that is less than the budget: see `memory_limit`."""
    total_steps: int


def run(
    config: TrainConfig,
    *,
    command: Sequence[str],
    reporter: Reporter,
    group: ProcessGroup = SINGLE_PROCESS,
    device: torch.device | None = None,
) -> RunSummary | None:
    """Train as ``config`` says, noting ``command`` in the run's folder.

    Returns None if a resumed run has ended already; its model is then written, if it was not.

    Of several processes each calls this, with its `group` and its `device`; rank 0 writes the run's folder.

    Raises:
        UnsupportedInput, BudgetInfeasible: before anything was written.
        TrainingFailed: a loss or weights are no numbers.
        Interrupted: a signal came; the checkpoint is written.
    """
    with deterministic_algorithms(config.deterministic), ExitStack() as lock:
        prepared = group.run_on_all(lambda: _prepare(config, group, device, reporter, lock))
        checkpoint, limit_bytes = group.broadcast((prepared.checkpoint, prepared.limit_bytes))
        return _train(replace(prepared, checkpoint=checkpoint, limit_bytes=limit_bytes), command, reporter)


def _prepare(
    config: TrainConfig, group: ProcessGroup, device: torch.device | None, reporter: Reporter, lock: ExitStack
) -> _Prepared:
    """Build the parts of a run, so that all bad input is found; nothing but a lock is written."""
    config, source = resolve(config)
    folder = RunFolder(config)
    if config.tensorboard:
        import_tensorboard()
    checkpoint = None
    if group.is_main_process:
        folder.check_place()
        lock.enter_context(only_run_in(folder.path, partial(reporter.say, important=True)))
        folder.tidy()
        checkpoint = folder.find_checkpoint(config.resume)
    work = build(config, source, group, device, sharded=config.strategy == "fsdp" and not group.is_single_process)
    return _Prepared(
        config=config,
        source=source,
        work=work,
        folder=folder,
        evaluator=make_evaluator(config, source, work),
        checkpoint=checkpoint,
        limit_bytes=noted_limit(folder.path),
        total_steps=config.total_steps(work.order.steps_per_epoch),
    )


def _train(prepared: _Prepared, command: Sequence[str], reporter: Reporter) -> RunSummary | None:
    config, work, folder, checkpoint = prepared.config, prepared.work, prepared.folder, prepared.checkpoint
    group, total_steps = work.group, prepared.total_steps
    identity = identity_of(config, work, total_steps)
    restored = Restored()
    average, scaler = MovingAverage(work.model, config.ema_decay), make_scaler(config.precision, work.device)
    if checkpoint is not None:
        restored = group.run_on_all(lambda: restore(config, work, checkpoint, identity, average, scaler))
    first_step = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None and (end := end_of_run(config, work, checkpoint, total_steps)) is not None:
        for note in group.run_on_all(lambda: folder.set_damaged_aside(checkpoint) if group.is_main_process else []):
            reporter.say(note, important=True)
        reporter.say(f"nothing to do: the run in {folder.path} {end}", important=True)
        _finish_ended(prepared, checkpoint, average, reporter)
        return None
    _introduce(prepared, reporter)
    if prepared.limit_bytes is not None and prepared.limit_bytes < work.budget.total_bytes:
        reporter.say(
            f"note    a step of this run has run out of memory, so plans are made for "
            f"{format_bytes(prepared.limit_bytes)}. Remove {folder.path / MEMORY_LIMIT} to have the whole budget.",
            important=True,
        )

    def plan(limit_bytes: int | None) -> tuple[tightfit.Applied, Budget]:
        with reporter.phases():
            return plan_run(config, prepared.work, average, first_step, total_steps, limit_bytes=limit_bytes)

    applied, budget = plan(prepared.limit_bytes)
    work = replace(work, budget=budget)

    def tighten(limit_bytes: int) -> tuple[tightfit.Applied, Budget]:
        nonlocal applied
        applied.remove()
        applied, budget = plan(limit_bytes)
        return applied, budget

    try:
        unused = unused_parameters_of(config, work, applied)
        model = data_parallel(work.model, group, work.device, unused=unused, accumulation_steps=work.accumulation_steps)
        assert applied.verdict is not None  # fit has verified what it returns
        reporter.say(format_plan(applied.plan))
        for line in format_gaps(applied.verdict):
            reporter.say(line, important=True)
        if not applied.plan.is_plain:
            reporter.say(format_table(applied.plan, _PLAN_LINES))
        progress = Progress(loss_before=loss_of_first_batch(work)) if checkpoint is None else progress_of(checkpoint)
        _on_first(group, lambda: _open(folder, config, command, applied, checkpoint, reporter))
        if checkpoint is not None:
            reporter.say(f"resumed from {checkpoint.folder.name}: {first_step} of {total_steps} steps are done")
            if restored.is_seeded_anew:
                reporter.say(
                    "note    another number of processes wrote it: what is drawn at random from here on is not what "
                    "they would have drawn"
                )
        elif config.resume is not None:
            reporter.say("nothing to resume: beginning with the first step")
        with _metrics_of(folder, config, group, reporter) as metrics:
            meter = StepMeter(work, average)
            checkpoints = CheckpointWriter(
                folder=folder.checkpoints,
                work=work,
                average=average,
                scaler=scaler,
                progress=progress,
                identity=identity,
                retention=Retention(last=config.keep_last, every=config.keep_every),
                metrics=metrics,
                reporter=reporter,
                room_bytes=copy_room_bytes(
                    applied.plan, budget, work.device, group.processes_here() if is_sharded(work.model) else 1
                ),
                last_step=first_step,
            )
            meter.beside_bytes = checkpoints.held_bytes
            loop = TrainingLoop(
                config=config,
                work=work,
                steps=OptimizerStep(work=work, applied=applied, model=model, scaler=scaler),
                meter=meter,
                evaluator=prepared.evaluator,
                average=average,
                progress=progress,
                log=StepLog(work=work, applied=applied, total_steps=total_steps, reporter=reporter, metrics=metrics),
                checkpoints=checkpoints,
                guard=FiniteGuard(work, average, folder.checkpoints),
                total_steps=total_steps,
                steps_done=first_step,
                tighten=tighten,
                folder=folder.path,
            )
            settle_sums(loop.steps, model, work, scaler, first_step)
            restored.restore_random_state()
            with closing(checkpoints):
                loop.run()
        mismatched_steps = 0 if applied.plans is None else applied.plans.statistics.mismatched_steps
    finally:
        applied.remove()
    summary = _summarise(prepared, loop, applied, meter, mismatched_steps, first_step)
    _finish(folder, work, average, loop.steps_done, summary.to_json())
    return summary


def _finish(folder: RunFolder, work: Workload, average: MovingAverage, step: int, summary: Mapping[str, Any]) -> None:
    """Write the model and the page of a run that has ended after `step` steps."""
    with average.in_place():
        folder.save_model(work.model.state_dict(), step, work.group)
        _on_first(work.group, lambda: folder.save_summary(summary))


def _finish_ended(prepared: _Prepared, checkpoint: Checkpoint, average: MovingAverage, reporter: Reporter) -> None:
    """Write the model of a run that was ended between its last checkpoint and that."""
    folder, work, step = prepared.folder, prepared.work, checkpoint.step
    if work.group.broadcast(
        work.group.is_main_process and (folder.is_finished(step) or not folder.is_newest(checkpoint))
    ):
        return
    FiniteGuard(work, average, folder.checkpoints).require_finite_state(step)
    progress = progress_of(checkpoint)
    summary = {
        "run_folder": str(folder.path),
        "model_file": str(folder.model),
        "steps": step,
        "stopped_early": step < prepared.total_steps,
        "best_metric": None if progress.best is None else work.task.best,
        "best": progress.best,
        "best_step": progress.best_step,
    }
    _on_first(work.group, lambda: reporter.open_log(folder.log))
    _finish(folder, work, average, step, summary)
    reporter.say(f"its model was not written when it ended: it is now, in {folder.model}", important=True)


def _summarise(
    prepared: _Prepared,
    loop: TrainingLoop,
    applied: tightfit.Applied,
    meter: StepMeter,
    mismatched_steps: int,
    first_step: int,
) -> RunSummary:
    work, progress, verdict = loop.work, loop.progress, applied.verdict
    assert verdict is not None  # fit has verified what it returns
    peak_bytes = max(meter.highest_peak_bytes, verdict.measured_peak_bytes + work.budget.beside_step_bytes)
    everyones = work.group.all_gather((peak_bytes, mismatched_steps))
    evaluation = loop.last_evaluation
    return RunSummary(
        plan=applied.plan,
        verdict=verdict,
        budget=work.budget,
        measured_peak_bytes=max(peak for peak, _ in everyones),
        mismatched_steps=max(steps for _, steps in everyones),
        processes=work.group.world_size,
        first_step=first_step,
        skipped_steps=loop.skipped_steps,
        steps=loop.steps_done,
        stopped_early=loop.steps_done < loop.total_steps,
        loss_before=progress.loss_before,
        loss_after=loss_of_first_batch(work),
        evaluation=None if evaluation is None else evaluation.metrics,
        evaluation_samples=0 if evaluation is None else evaluation.samples,
        best_metric=work.task.best,
        best=progress.best,
        best_step=progress.best_step,
        run_folder=str(prepared.folder.path),
        model_file=str(prepared.folder.model),
    )


def _on_first(group: ProcessGroup, work: Callable[[], None]) -> None:
    """Do `work` in rank 0; where it fails, it fails in all processes."""
    group.run_on_all(lambda: work() if group.is_main_process else None)


def _open(
    folder: RunFolder,
    config: TrainConfig,
    command: Sequence[str],
    applied: tightfit.Applied,
    checkpoint: Checkpoint | None,
    reporter: Reporter,
) -> None:
    notes = folder.open(config, command, applied.plan, applied.profile, checkpoint)
    reporter.open_log(folder.log)
    for note in notes:
        reporter.say(note, important=True)


def _metrics_of(
    folder: RunFolder, config: TrainConfig, group: ProcessGroup, reporter: Reporter
) -> AbstractContextManager[MetricsFile | None]:
    if not group.is_main_process:
        return nullcontext()
    say = partial(reporter.say, important=True)
    return MetricsFile(folder.metrics, folder.tensorboard if config.tensorboard else None, say)


def _introduce(prepared: _Prepared, reporter: Reporter) -> None:
    config, source, work, evaluator = prepared.config, prepared.source, prepared.work, prepared.evaluator
    parameters = sum(parameter.numel() for parameter in work.model.parameters())
    reporter.say(f"model   {source.name}: {source.summary.rpartition('· ')[2]}; {parameters:,} parameters")
    reporter.say(f"data    {work.data.description}")
    if evaluator is not None:
        origin = f" of {evaluator.data.description}" if config.eval_dataset is not None else ""
        reporter.say(f"eval    {len(evaluator.samples):,} held-out samples{origin}")
    split = f", {work.accumulation_steps} microbatches a step" if work.accumulation_steps > 1 else ""
    origin = f" ({work.budget.origin})" if work.budget.origin else ""
    budget = f"{format_bytes(work.budget.total_bytes)}{origin}"
    reporter.say(f"run     {prepared.folder.path} on {work.device}{split}, budget {budget}")
