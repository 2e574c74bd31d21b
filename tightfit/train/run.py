"""The training run: plan a step that fits the budget, then take it again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

import tightfit
from tightfit.device import device_for
from tightfit.device.budget import resolve_budget
from tightfit.distributed.fsdp import is_sharded
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup, RankFailed
from tightfit.errors import BudgetInfeasible, UnsupportedInput
from tightfit.records import Profile
from tightfit.report.plan_table import format_table
from tightfit.train.checkpoint import Checkpoint, load_checkpoint
from tightfit.train.config import TrainConfig
from tightfit.train.data import load_data
from tightfit.train.data.loader import to_device
from tightfit.train.data.split import spread
from tightfit.train.determinism import deterministic_algorithms
from tightfit.train.ema import MovingAverage
from tightfit.train.evaluation import Evaluator, judging
from tightfit.train.largest_batch import largest_microbatch, naming
from tightfit.train.loop import Training
from tightfit.train.models import ModelSource
from tightfit.train.optimizer_step import Stepper
from tightfit.train.parallel.ddp import bytes_of_exchange, parallel
from tightfit.train.parallel.fsdp import whole
from tightfit.train.parallel.unused_parameters import Reach, reach_of
from tightfit.train.precision import make_scaler
from tightfit.train.progress import Progress
from tightfit.train.reporter import Reporter
from tightfit.train.run_folder import RunFolder
from tightfit.train.run_metrics import MetricsFile, import_tensorboard
from tightfit.train.summary import RunSummary, format_plan
from tightfit.train.workload import Workload, build, data_options, for_task, resolve, seed_everything, seed_of
from tightfit.units import format_bytes

#: Of the plan's table, before the first step.
_PLAN_LINES = 5


def run(
    config: TrainConfig,
    *,
    command: Sequence[str],
    reporter: Reporter,
    group: ProcessGroup = SINGLE_PROCESS,
    device: torch.device | None = None,
) -> RunSummary | None:
    """Train as ``config`` says; ``command`` is noted in the run's folder. None when a resumed run is already done.

    Of several processes each calls this, with its `group` and its `device`; rank 0 writes the run's folder.

    Raises:
        UnsupportedInput, BudgetInfeasible: before anything was written.
        TrainingFailed: the loss is no longer a number.
        Interrupted: a signal came; the checkpoint is written.
    """
    with deterministic_algorithms(config.deterministic):
        return _run(config, command, reporter, group, device)


def _run(
    config: TrainConfig, command: Sequence[str], reporter: Reporter, group: ProcessGroup, device: torch.device | None
) -> RunSummary | None:
    config, source, work, folder, evaluator, checkpoint = group.run_on_all(lambda: _prepared(config, group, device))
    checkpoint = group.broadcast(checkpoint)
    total_steps = total_steps_of(config, work)
    identity = _identity(config, work, total_steps)
    scaler = make_scaler(config.precision, work.device)
    further = {} if checkpoint is None else group.run_on_all(lambda: _restored(config, work, checkpoint, identity))
    average = make_average(config, work, further)
    if scaler is not None and "scaler" in further:
        scaler.load_state_dict(further["scaler"])
    first_step = checkpoint.step if checkpoint else 0
    if checkpoint is not None and first_step >= total_steps:
        reporter.say(
            f"nothing to do: the run in {folder.path} has done {first_step} steps, and {total_steps} were asked for. "
            f"Train longer with --steps {2 * first_step}, or begin another run with --mark NAME.",
            important=True,
        )
        return None
    _introduce(config, source, work, folder, evaluator, reporter)
    applied, beside_bytes = plan_run(config, work, average, first_step, total_steps)
    try:
        model = parallel(
            work.model,
            group,
            work.device,
            reach=_reach(config, work, applied),
            accumulation_steps=work.accumulation_steps,
        )
        reporter.say(format_plan(applied.plan))
        if not applied.plan.is_plain:
            reporter.say(format_table(applied.plan, _PLAN_LINES))
        progress = Progress(loss_before=_first_loss(work)) if checkpoint is None else _progress_of(checkpoint)
        group.run_on_all(
            lambda: _open(folder, config, command, applied, first_step, reporter) if group.is_main_process else None
        )
        if checkpoint is not None:
            reporter.say(f"resumed from {checkpoint.folder.name}: {first_step} of {total_steps} steps are done")
        elif config.resume is not None:
            reporter.say("nothing to resume: beginning with the first step")
        with _metrics_of(folder, config, group) as metrics:
            training = Training(
                config=config,
                work=work,
                stepper=Stepper(work=work, applied=applied, scaler=scaler, model=model),
                evaluator=evaluator,
                average=average,
                progress=progress,
                folder=folder,
                metrics=metrics,
                reporter=reporter,
                identity=identity,
                total_steps=total_steps,
                beside_bytes=beside_bytes,
            )
            training.run(first_step)
        verdict = applied.verdict
        assert verdict is not None  # fit has judged what it returns
        mismatched_steps = 0 if applied.plans is None else applied.plans.statistics.mismatched_steps
    finally:
        applied.remove()
    peak_bytes = max(training.highest_peak_bytes, verdict.measured_peak_bytes + beside_bytes)
    everyones = group.all_gather((peak_bytes, mismatched_steps))
    summary = RunSummary(
        plan=applied.plan,
        verdict=verdict,
        budget_bytes=work.budget_bytes,
        measured_peak_bytes=max(peak for peak, _ in everyones),
        mismatched_steps=max(steps for _, steps in everyones),
        processes=group.world_size,
        beside_bytes=beside_bytes,
        first_step=first_step,
        steps=training.steps_done,
        stopped_early=training.steps_done < total_steps,
        loss_before=progress.loss_before,
        loss_after=_first_loss(work),
        evaluation=training.last_evaluation,
        best_metric=work.task.best,
        best=progress.best,
        best_step=progress.best_step,
        run_folder=str(folder.path),
        model_file=str(folder.model),
    )
    with nullcontext() if average is None else average.in_place():
        weights = whole(work.model.state_dict(), keep=group.is_main_process)

        def finish() -> None:
            folder.save_model(weights)
            folder.save_summary(summary.to_json())

        group.run_on_all(lambda: finish() if group.is_main_process else None)
    return summary


def _prepared(
    config: TrainConfig, group: ProcessGroup, device: torch.device | None
) -> tuple[TrainConfig, ModelSource, Workload, RunFolder, Evaluator | None, Checkpoint | None]:
    """All that can be wrong with what was asked for; nothing is written."""
    config, source = resolve(config)
    folder = RunFolder(config)
    if config.tensorboard:
        import_tensorboard()
    checkpoint = folder.find_checkpoint(config.resume) if group.is_main_process else None
    sharded = config.strategy == "fsdp" and not group.is_single_process
    work = build(config, source, group, device, sharded=sharded)
    return config, source, work, folder, make_evaluator(config, source, work), checkpoint


def _restored(
    config: TrainConfig, work: Workload, checkpoint: Checkpoint, identity: dict[str, object]
) -> Mapping[str, Any]:
    """Put model, optimizer and random generators where the checkpoint left them; what else it holds."""
    _check_identity(checkpoint, identity)
    group = work.group
    further, knows_random = load_checkpoint(
        checkpoint, model=work.model, optimizer=work.optimizer, rank=group.rank, world_size=group.world_size
    )
    if not knows_random:
        seed_everything(seed_of(config.seed, group.rank, checkpoint.step))
    return further


def _reach(config: TrainConfig, work: Workload, applied: tightfit.Applied) -> Reach:
    """Which parameters a step gives a gradient, in every process."""
    if work.group.is_single_process or is_sharded(work.model):
        return Reach.ALL
    if config.ddp_find_unused_parameters == "on":
        return Reach.VARYING
    return max(work.group.all_gather(reach_of(work.model, work.microbatch(0), applied, work.spec())))


def _open(
    folder: RunFolder,
    config: TrainConfig,
    command: Sequence[str],
    applied: tightfit.Applied,
    first_step: int,
    reporter: Reporter,
) -> None:
    folder.open(config, command, applied.plan, first_step)
    reporter.open_log(folder.log)


def _metrics_of(
    folder: RunFolder, config: TrainConfig, group: ProcessGroup
) -> AbstractContextManager[MetricsFile | None]:
    if not group.is_main_process:
        return nullcontext()
    return MetricsFile(folder.metrics, folder.tensorboard if config.tensorboard else None)


def total_steps_of(config: TrainConfig, work: Workload) -> int:
    """Optimizer steps of the whole run."""
    return config.steps or (config.epochs or 1) * work.order.steps_per_epoch


def make_evaluator(config: TrainConfig, source: ModelSource, work: Workload) -> Evaluator | None:
    """What judges the model; None where nothing is held out.

    Raises:
        UnsupportedInput: an evaluation is asked for, but there is nothing to evaluate on.
    """
    data, samples = work.data, work.data.held_out
    if config.eval_dataset is not None:
        options = replace(data_options(config, source), arguments={})
        data = for_task(load_data(config.eval_dataset, options), work.task)
        if data.facts.kind != work.data.facts.kind:
            raise UnsupportedInput(
                f"--eval-dataset {config.eval_dataset} gives {data.facts.kind}, but the model is trained on "
                f"{work.data.facts.kind}. Evaluate on data of the same kind."
            )
        samples = data.samples
    if samples is None:
        for name, value in (("eval-every", config.eval_every), ("early-stop", config.early_stop)):
            if value is not None:
                raise UnsupportedInput(
                    f"--{name} {value} asks for evaluations, but {config.dataset} holds nothing out to evaluate on. "
                    f"Add --eval-dataset, or let the dataset's factory return a pair: (training, held out)."
                )
        return None
    return Evaluator(
        model=work.model,
        task=work.task,
        data=data,
        samples=spread(samples, config.eval_samples),
        batch_size=config.samples_at_a_time(work.group.world_size),
        group=work.group,
        device=work.device,
        autocast=work.autocast,
        optimizer=work.optimizer,
    )


def make_average(config: TrainConfig, work: Workload, further: Any) -> MovingAverage | None:
    """The moving average of the weights; None where none is asked for."""
    if config.ema_decay is None:
        return None
    average = MovingAverage(work.model, config.ema_decay)
    if "average" in further:
        average.load_state_dict(further["average"])
    return average


def plan_run(
    config: TrainConfig, work: Workload, average: MovingAverage | None, first_step: int, total_steps: int
) -> tuple[tightfit.Applied, int]:
    """A plan for the largest batch of the run, and the bytes of the budget that are held beside the step.

    Batches of other sizes, at the ends of epochs, are planned, too: whether they fit is better known now.

    Raises:
        BudgetInfeasible: a batch does not fit; it is named.
    """
    extreme = largest_microbatch(work.data, work.loader, first_step, total_steps)
    parts = work.loader.microbatches(extreme.step)
    batch = to_device(parts[extreme.place], work.device)
    work.loss.share = work.shares(parts)[extreme.place]
    beside_bytes = (0 if average is None else average.nbytes) + work.bytes_beside(parts, extreme.place)
    beside_bytes += bytes_of_exchange(work.model, work.group)
    reference = config.reference_memory

    def fitted(profile: Profile | None) -> tightfit.Applied:
        with naming(batch, extreme, beside_bytes):
            return tightfit.fit(
                work.model,
                batch,
                budget=_left(work.budget_bytes, beside_bytes),
                loss=work.loss,
                optimizer=work.optimizer,
                accumulation_steps=work.accumulation_steps,
                autocast=work.autocast,
                clip_norm=work.clip_norm,
                grad_checkpoint=config.grad_checkpoint,
                reference_budget_bytes=(
                    None if reference is None else resolve_budget(reference, work.device, name="--reference-memory")
                ),
                profile=profile,
            )

    group = work.group
    if is_sharded(work.model):  # no step without all of them
        try:
            applied = fitted(None)
        except BudgetInfeasible as problem:  # all have found it: said once
            if not group.is_main_process:
                raise RankFailed(0, str(problem), is_bad_input=True) from None
            raise
    else:
        # Rank 0 measures, alone on its machine's cores; where all have batches of the same sizes, all then solve the
        # same.
        mine = group.run_on_all(lambda: fitted(None) if group.is_main_process else None)
        profile = group.broadcast(None if mine is None else mine.profile)
        applied = group.run_on_all(lambda: fitted(profile) if mine is None else mine)
    # What the processes tell each other comes first: inside `together` one may end before another.
    steps = work.order.sizes(first_step, total_steps).values()
    shares = {step: work.shares(work.loader.microbatches(step)) for step in steps}

    def prepare_others() -> None:
        for step in shares:
            for place, part in enumerate(work.loader.microbatches(step)):
                work.loss.share = shares[step][place]
                moved = to_device(part, work.device)
                other = replace(extreme, step=step, place=place, numbers=work.loader.numbers(step)[place])
                with naming(moved, other, beside_bytes):
                    applied.prepare(moved)

    try:
        group.run_on_all(prepare_others)
    except BaseException:
        applied.remove()
        raise
    return applied, beside_bytes


def _left(budget_bytes: int, beside_bytes: int) -> int:
    if beside_bytes >= budget_bytes:
        raise UnsupportedInput(
            f"the budget is {format_bytes(budget_bytes)}, but the moving average of the weights and the other parts of "
            f"the batch alone take {format_bytes(beside_bytes)}. Give more --memory, or leave out --ema-decay."
        )
    return budget_bytes - beside_bytes


def _introduce(
    config: TrainConfig,
    source: ModelSource,
    work: Workload,
    folder: RunFolder,
    evaluator: Evaluator | None,
    reporter: Reporter,
) -> None:
    parameters = sum(parameter.numel() for parameter in work.model.parameters())
    reporter.say(f"model   {source.name}: {source.summary.rpartition('· ')[2]}; {parameters:,} parameters")
    reporter.say(f"data    {work.data.description}")
    if evaluator is not None:
        origin = f" of {evaluator.data.description}" if config.eval_dataset is not None else ""
        reporter.say(f"judged  on {len(evaluator.samples):,} held-out samples{origin}")
    split = f", {work.accumulation_steps} microbatches a step" if work.accumulation_steps > 1 else ""
    reporter.say(
        f"run     {folder.path} on {work.device}{split}, budget {format_bytes(work.budget_bytes)}"
        f"{'' if config.memory != 'auto' else ' (all that is free)'}"
    )


def _identity(config: TrainConfig, work: Workload, total_steps: int) -> dict[str, object]:
    """What may not change when a run goes on."""
    names = (
        "model", "sequence_length", "batch_size", "microbatch_size", "accumulation_steps", "optimizer", "lr",
        "weight_decay", "momentum", "beta2", "clip_norm", "precision", "schedule", "warmup_steps", "min_lr_ratio",
        "ema_decay", "seed", "deterministic",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in names},
        "model_args": dict(config.model_args),
        "data": work.data.fingerprint,
        # A falling learning rate depends on where it is to arrive.
        "length_of_the_schedule": None if config.schedule == "constant" else total_steps,
    }


def _check_identity(checkpoint: Checkpoint, identity: dict[str, object]) -> None:
    for key, now in identity.items():
        then = checkpoint.identity.get(key)
        if then != now:
            raise UnsupportedInput(
                f"the checkpoint {checkpoint.folder} was written with {key.replace('_', ' ')} {then!r}, but now it is "
                f"{now!r}, so going on would not be the same run. Use the old value, or begin another run with "
                f"--mark NAME."
            )


def _progress_of(checkpoint: Checkpoint) -> Progress:
    try:
        return Progress.from_json(checkpoint.progress)
    except TypeError:
        raise UnsupportedInput(
            f"{checkpoint.folder} does not say how its run went so far, so this version cannot go on from it. "
            f"Begin another run with --mark NAME."
        ) from None


def _first_loss(work: Workload) -> float:
    """The loss on the run's first batch, without dropout and without touching statistics."""
    parts = work.loader.microbatches(0)
    total = 0.0
    with judging(work.model), torch.no_grad():
        for part, share in zip(parts, work.shares(parts), strict=True):
            work.loss.share = share
            with device_for(work.device).autocast(work.autocast):
                total += work.loss(work.model, to_device(part, work.device)).item()
    return work.group.all_reduce_sum([total])[0] / work.group.world_size
