"""The training loop, from a batch to a checkpoint.

Of every batch: its microbatches, forward and backward of each under the plan, clipping, the optimizer.  After it: the
moving average of the weights, and, of some steps, a logged line, an evaluation, a checkpoint; and the end, by the last
step, by early stopping or by a signal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tightfit.installation.applied import Applied
from tightfit.step.microbatch import Microbatch
from tightfit.train.checkpoint_writer import CheckpointWriter
from tightfit.train.config import TrainConfig
from tightfit.train.data.loader import to_device
from tightfit.train.ema import MovingAverage
from tightfit.train.evaluation import Evaluation, Evaluator
from tightfit.train.failures import explaining_step_failures
from tightfit.train.finiteness import FiniteGuard, gradients_are_finite
from tightfit.train.optimizers import set_lr
from tightfit.train.parallel.ddp import all_reducing, require_all_reduced
from tightfit.train.parallel.fsdp import unsharded
from tightfit.train.progress import Progress
from tightfit.train.schedules import lr_at
from tightfit.train.signals import Interrupted, StopRequest
from tightfit.train.step_log import StepLog
from tightfit.train.step_meter import MeasuredStep, StepMeter, StepResult
from tightfit.train.workload import Workload


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """Takes optimizer steps under a plan."""

    work: Workload
    applied: Applied
    model: nn.Module
    """What is called: the workload's model, or that wrapped for several processes."""
    scaler: torch.amp.GradScaler
    skips_nonfinite: bool = False
    """Leave the weights alone in a step whose loss or gradients are not finite."""

    def prepare(self, microbatches: Sequence[Microbatch]) -> None:
        """Plan batches of these shapes now, if there is no plan for them yet."""
        for microbatch in microbatches:
            self.applied.prepare(to_device(microbatch, self.work.device))

    def take(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """Take a step.

        Gradients are zeroed in place (``set_to_none=False``) on purpose: the budget counts them as held during the
        whole step, so freeing them in between would only make the measured peak look better than what the step needs.

        Raises:
            TrainingFailed: the device has no more memory; or not all gradients were all-reduced.
        """
        work = self.work
        with explaining_step_failures(microbatches, self.applied.plan, work.budget, work.group):
            work.optimizer.zero_grad(set_to_none=False)
            total: Tensor | None = None
            for place, microbatch in enumerate(microbatches, 1):
                with all_reducing(self.model, last=place == len(microbatches)):
                    loss = self.applied.loss(self.model, to_device(microbatch, work.device))
                    self.scaler.scale(loss).backward()
                total = loss.detach() if total is None else total + loss.detach()
            assert total is not None
            require_all_reduced(self.model)
            norm = None
            if work.clip_norm is not None:
                self.scaler.unscale_(work.optimizer)
                norm = unsharded(torch.nn.utils.clip_grad_norm_(work.model.parameters(), work.clip_norm))
            if self.skips_nonfinite and not self._is_finite(total, norm):
                return StepResult(loss=total, gradient_norm=norm, skipped=True)
            self.scaler.step(work.optimizer)
            self.scaler.update()
            return StepResult(loss=total, gradient_norm=norm)

    def _is_finite(self, loss: Tensor, norm: Tensor | None) -> bool:
        """Tell whether loss and gradients are finite in all processes.  A loss scaler looks at them by itself."""
        if self.scaler.is_enabled():
            return True
        is_finite = math.isfinite(loss.item()) and (norm is None or math.isfinite(norm.item()))
        return all(self.work.group.all_gather(is_finite and gradients_are_finite(self.work.model.parameters())))


@dataclass(kw_only=True)
class TrainingLoop:
    """The steps of a run, and what they lead to."""

    config: TrainConfig
    work: Workload
    steps: OptimizerStep
    meter: StepMeter
    evaluator: Evaluator | None
    average: MovingAverage
    progress: Progress
    log: StepLog
    checkpoints: CheckpointWriter
    guard: FiniteGuard
    total_steps: int
    steps_done: int
    skipped_steps: int = 0
    """Of this process's, because something in them was not finite."""
    last_evaluation: Evaluation | None = None

    def run(self) -> None:
        """Take the steps that are left.

        Raises:
            TrainingFailed: a loss or weights are no numbers, or the memory or the disk is at an end.
            Interrupted: a signal came; the checkpoint is written.
        """
        first_step = self.steps_done
        with (
            StopRequest(self.work.group) as stop,
            closing(self.work.stream(first_step, self.total_steps)) as batches,
            self.log.reporter.progress(first_step, self.total_steps),
        ):
            for step in range(first_step + 1, self.total_steps + 1):
                started = time.perf_counter()
                microbatches = next(batches)
                lr = self._set_lr(step)
                is_last = step == self.total_steps
                is_evaluated = self._is_evaluated(step)
                is_logged = is_evaluated or is_last or step == first_step + 1 or step % self.config.log_every == 0
                evaluation, is_best = None, False

                if not is_logged:
                    result = self.steps.take(microbatches)
                    self._note(step, result)
                    self.average.update(step)
                    self.meter.add(time.perf_counter() - started)
                    self.log.reporter.advance(step)
                else:
                    measured = self.meter.measure(self.steps, microbatches)
                    self._note(step, measured)
                    self.average.update(step)
                    stop.expect_steps_of(measured.step_ms)
                    if is_evaluated:
                        evaluation = self._evaluate()
                        is_best = self.progress.note(evaluation, step, self.work.task)
                    self.log.add(step, lr=lr, measured=measured, evaluation=evaluation)

                stops_early = evaluation is not None and self.progress.has_stalled(self.config.early_stop)
                is_finished = is_last or stops_early
                if is_finished:
                    self.guard.require_a_step(step - first_step, self.skipped_steps)
                is_saved = is_finished or is_best or step % self.config.save_every == 0
                if is_saved:
                    self._save(step, is_best=is_best)
                self.steps_done = step

                signal_number = stop.after_step(step)
                if signal_number is not None:
                    if not is_saved:
                        self._save(step, is_best=False)
                    rest = (
                        "The run is done but for its model, which --resume auto writes."
                        if is_finished
                        else "Go on with --resume auto."
                    )
                    raise Interrupted(
                        signal_number, f"stopped by a signal after step {step}; the checkpoint is written. {rest}"
                    )
                if is_finished:
                    break
        if self.steps_done < self.total_steps:
            self.log.reporter.say(self.progress.why_stopped(self.work.task))

    def _note(self, step: int, taken: StepResult | MeasuredStep) -> None:
        """Look at whether a step's numbers are finite."""
        if taken.skipped:
            self.skipped_steps += 1
            self.log.reporter.say(f"step {step} is skipped: its loss or gradients are not finite; the weights stay")
        elif isinstance(taken, MeasuredStep):
            # A loss scaler meets infinite gradients in the ordinary course of things, and skips their step.
            norm = None if self.steps.scaler.is_enabled() else taken.gradient_norm
            self.guard.require_finite_step(step, taken.loss, norm)
        elif not self.steps.scaler.is_enabled():
            self.guard.note(taken.loss)

    def _save(self, step: int, *, is_best: bool) -> None:
        self.guard.require_finite_state(step)
        self.checkpoints.save(step, is_best=is_best)

    def _set_lr(self, step: int) -> float:
        config = self.config
        lr = lr_at(
            step - 1,
            total_steps=self.total_steps,
            highest=config.lr,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            min_ratio=config.min_lr_ratio,
        )
        set_lr(self.work.optimizer, lr)
        return lr

    def _is_evaluated(self, step: int) -> bool:
        if self.evaluator is None:
            return False
        every = self.config.eval_every
        ends_interval = self.work.order.ends_epoch(step - 1) if every is None else step % every == 0
        return ends_interval or step == self.total_steps

    def _evaluate(self) -> Evaluation:
        assert self.evaluator is not None
        with self.average.in_place():
            evaluation = self.evaluator.evaluate()
        self.meter.note_evaluation(evaluation.peak_bytes)
        self.last_evaluation = evaluation
        return evaluation
