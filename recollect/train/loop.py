"""The training run: plan a step that fits the budget, then take it again and again.

Gradients are zeroed in place (``set_to_none=False``) on purpose: the budget counts them as held during the whole step,
so freeing them in between would only make the measured peak look better than what the step needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import recollect
from recollect.budget import resolve_budget
from recollect.errors import RecollectError, UnsupportedInput
from recollect.meter import measure_peak, resident_bytes
from recollect.out_of_memory import is_out_of_memory
from recollect.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from recollect.train.config import TrainConfig
from recollect.train.models import ModelSource
from recollect.train.reporter import Reporter, StepReport
from recollect.train.run_folder import RunFolder
from recollect.train.signals import Interrupted, StopRequest
from recollect.train.summary import RunSummary, format_plan
from recollect.train.workload import Workload, build, resolve
from recollect.units import format_bytes


class TrainingFailed(RecollectError):
    """A run that began well cannot go on."""


def run(config: TrainConfig, *, command: Sequence[str], reporter: Reporter) -> RunSummary | None:
    """Train as ``config`` says; ``command`` is noted in the run's folder. None when a resumed run is already done.

    Raises:
        UnsupportedInput, BudgetInfeasible: before anything was written.
        TrainingFailed: the loss is no longer a number.
        Interrupted: a signal came; the checkpoint is written.
    """
    config, source = resolve(config)
    folder = RunFolder(config)
    checkpoint = folder.find_checkpoint(config.resume)
    work = build(config, source)
    total_steps = config.steps or (config.epochs or 1) * work.order.steps_per_epoch
    identity = _identity(config, work)
    if checkpoint is not None:
        _check_identity(checkpoint, identity)
        load_checkpoint(checkpoint, model=work.model, optimizer=work.optimizer)
    first_step = checkpoint.step if checkpoint else 0
    if checkpoint is not None and first_step >= total_steps:
        reporter.say(
            f"nothing to do: the run in {folder.path} has done {first_step} steps, and {total_steps} were asked for. "
            f"Train longer with --steps {2 * first_step}, or begin another run with --mark NAME."
        )
        return None
    _introduce(config, source, work, folder, reporter)
    applied = _fit(config, work, first_step)
    incomplete = work.order.first_incomplete(first_step, total_steps)
    if incomplete is not None:  # whether that fits is better known now than at the end of an epoch
        try:
            applied.prepare(work.batch(incomplete))
        except BaseException:
            applied.remove()
            raise
    verdict = applied.verdict
    assert verdict is not None  # fit has judged what it returns
    reporter.say(format_plan(applied.plan))
    loss_before = checkpoint.loss_before if checkpoint else _evaluate(work)
    folder.open(config, command, applied.plan, first_step)
    reporter.open_log(folder.log)
    if checkpoint is not None:
        reporter.say(f"resumed from {checkpoint.folder.name}: {first_step} of {total_steps} steps are done")
    elif config.resume is not None:
        reporter.say("nothing to resume: beginning with the first step")

    loop = _Loop(
        config=config,
        work=work,
        applied=applied,
        folder=folder,
        reporter=reporter,
        identity=identity,
        loss_before=loss_before,
    )
    try:
        measured_peak_bytes = loop.run(first_step, total_steps)
    finally:
        applied.remove()
    model_file = folder.save_model(work.model)
    return RunSummary(
        plan=applied.plan,
        verdict=verdict,
        budget_bytes=work.budget_bytes,
        measured_peak_bytes=max(measured_peak_bytes, verdict.measured_peak_bytes),
        first_step=first_step,
        steps=total_steps,
        loss_before=loss_before,
        loss_after=_evaluate(work),
        run_folder=str(folder.path),
        model_file=str(model_file),
    )


def _introduce(config: TrainConfig, source: ModelSource, work: Workload, folder: RunFolder, reporter: Reporter) -> None:
    parameters = sum(parameter.numel() for parameter in work.model.parameters())
    reporter.say(f"model   {source.name}: {source.summary.rpartition('· ')[2]}; {parameters:,} parameters")
    reporter.say(f"data    {work.data.description}")
    reporter.say(
        f"run     {folder.path} on {work.device}, budget {format_bytes(work.budget_bytes)}"
        f"{'' if config.memory != 'auto' else ' (all that is free)'}"
    )


def _identity(config: TrainConfig, work: Workload) -> dict[str, object]:
    """What may not change when a run goes on."""
    return {
        "model": config.model,
        "model_args": dict(config.model_args),
        "data": work.data.fingerprint,
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "seed": config.seed,
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


def _fit(config: TrainConfig, work: Workload, first_step: int) -> recollect.Applied:
    reference = config.reference_memory
    is_full = len(work.order.indices(first_step)) == config.batch_size
    return recollect.fit(
        work.model,
        work.batch(first_step if is_full else 0),
        budget=work.budget_bytes,
        loss=work.loss,
        optimizer=work.optimizer,
        grad_checkpoint=config.grad_checkpoint,
        reference_budget_bytes=(
            None if reference is None else resolve_budget(reference, work.device, name="--reference-memory")
        ),
    )


def _evaluate(work: Workload) -> float:
    """The loss on the run's first batch, without dropout and without touching statistics."""
    was_training = {module: module.training for module in work.model.modules()}
    work.model.eval()
    with torch.no_grad():
        loss = work.loss(work.model, work.batch(0)).item()
    for module, training in was_training.items():
        module.training = training
    return loss


@dataclass(frozen=True, kw_only=True)
class _Loop:
    config: TrainConfig
    work: Workload
    applied: recollect.Applied
    folder: RunFolder
    reporter: Reporter
    identity: dict[str, object]
    loss_before: float

    def run(self, first_step: int, total_steps: int) -> int:
        """Take the steps. Returns the highest peak that was measured."""
        highest_peak_bytes = 0
        watch = _Stopwatch(self.work.device)
        self.reporter.start_progress(first_step, total_steps)
        with StopRequest() as stop:
            for done in range(first_step + 1, total_steps + 1):
                started = time.perf_counter()
                batch = self.work.batch(done - 1)
                is_last = done == total_steps
                if done % self.config.log_every == 0 or done == first_step + 1 or is_last:
                    watch.settle()
                    report = self._logged_step(batch, done, total_steps, watch)
                    highest_peak_bytes = max(highest_peak_bytes, report.peak_bytes)
                    watch = _Stopwatch(self.work.device)
                else:
                    self._step(batch)
                    watch.add(time.perf_counter() - started)
                    self.reporter.advance(done)
                if done % self.config.save_every == 0 or is_last or stop.signal_number is not None:
                    self._save(done)
                if stop.signal_number is not None:
                    raise Interrupted(
                        stop.signal_number,
                        f"stopped by a signal after step {done}; the checkpoint is written. Go on with --resume auto.",
                    )
        self.reporter.stop_progress()
        return highest_peak_bytes

    def _step(self, batch: Any) -> Tensor:
        try:
            self.work.optimizer.zero_grad(set_to_none=False)
            loss = self.applied.loss(self.work.model, batch)
            loss.backward()
            self.work.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingFailed(
                f"a step ran out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}), "
                f"though its predicted peak of {format_bytes(self.applied.plan.predicted_peak_bytes)} within the "
                f"budget of {format_bytes(self.work.budget_bytes)}: the device has less than that to give, or "
                f"something else took it. Go on from the last checkpoint with --resume auto and a smaller --memory."
            ) from error
        return loss.detach()

    def _logged_step(self, batch: Any, done: int, total_steps: int, watch: _Stopwatch) -> StepReport:
        """A step whose memory is measured. On a CPU that makes it slower, so its time counts only if there is no
        other.
        """
        work = self.work
        self.applied.prepare(batch)  # planning runs the profiler, and so does the meter on a CPU: one at a time
        resident = resident_bytes(work.model, batch, work.optimizer)
        started = time.perf_counter()
        loss, peak_bytes = measure_peak(lambda: self._step(batch), resident, work.device)
        value = loss.item()
        step_ms = watch.mean_ms or (time.perf_counter() - started) * 1000
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the loss is {value} at step {done}, so the weights are no longer of use. "
                f"The last checkpoint in {self.folder.checkpoints} is from before. Try a smaller --lr."
            )
        report = StepReport(
            step=done,
            total_steps=total_steps,
            epoch=work.order.epoch_of(done - 1),
            loss=value,
            step_ms=step_ms,
            samples_per_second=len(work.order.indices(done - 1)) / step_ms * 1000,
            memory_now_bytes=resident_bytes(work.model, batch, work.optimizer),
            peak_bytes=peak_bytes,
            budget_bytes=work.budget_bytes,
        )
        self.reporter.step(report)
        self.folder.add_metrics(
            {
                "step": done,
                "epoch": report.epoch,
                "loss": value,
                "lr": self.config.lr,
                "step_ms": step_ms,
                "peak_bytes": peak_bytes,
                "budget_bytes": work.budget_bytes,
                "samples_per_second": report.samples_per_second,
                "memory_now_bytes": report.memory_now_bytes,
            }
        )
        return report

    def _save(self, done: int) -> None:
        save_checkpoint(
            self.folder.checkpoints,
            step=done,
            identity=self.identity,
            loss_before=self.loss_before,
            model=self.work.model,
            optimizer=self.work.optimizer,
        )


class _Stopwatch:
    """Mean time of the steps since the last logged one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._steps = 0

    def add(self, seconds: float) -> None:
        self._seconds += seconds
        self._steps += 1

    def settle(self) -> None:
        """Wait for the device, so that work handed to it counts for the steps that handed it over."""
        if self._device.type == "cuda" and self._steps:
            started = time.perf_counter()
            torch.cuda.synchronize(self._device)
            self._seconds += time.perf_counter() - started

    @property
    def mean_ms(self) -> float:
        """0.0 when there was no step."""
        return self._seconds / self._steps * 1000 if self._steps else 0.0
