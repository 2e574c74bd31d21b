"""The training loop, from a batch to a checkpoint.

Of every batch: its microbatches, forward and backward of each under the plan, clipping, the optimizer.  After it: the
moving average of the weights, and, of some steps, a logged line, an evaluation, a checkpoint; and the end, by the last
step, by early stopping or by a signal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tightfit.device.budget import Budget
from tightfit.errors import BudgetInfeasible, TightfitError, UnsupportedInput, VerificationFailed, remedy_for
from tightfit.installation.applied import Applied
from tightfit.step.microbatch import Microbatch
from tightfit.train.checkpoint_writer import CheckpointWriter
from tightfit.train.config import TrainConfig
from tightfit.train.data.loader import to_device
from tightfit.train.ema import MovingAverage
from tightfit.train.evaluation import Evaluation, Evaluator
from tightfit.train.failures import StepRanOutOfMemory, TrainingFailed, explaining_step_failures, shown_samples
from tightfit.train.finiteness import FiniteGuard, NonFiniteStep, nonfinite_part
from tightfit.train.inspection import keep_batch
from tightfit.train.memory_limit import FILE as MEMORY_LIMIT
from tightfit.train.memory_limit import limit_below, note_limit
from tightfit.train.optimizers import set_lr
from tightfit.train.parallel.ddp import all_reducing, require_all_reduced
from tightfit.train.parallel.fsdp import unsharded
from tightfit.train.progress import Progress
from tightfit.train.schedules import lr_at
from tightfit.train.signals import Interrupted, StopRequest
from tightfit.train.step_log import StepLog
from tightfit.train.step_meter import MeasuredStep, StepMeter, StepResult
from tightfit.train.step_undo import StepUndo
from tightfit.train.workload import Workload
from tightfit.units import format_bytes


@dataclass(kw_only=True)
class OptimizerStep:
    """Takes optimizer steps under a plan."""

    work: Workload
    applied: Applied
    model: nn.Module
    """What is called: the workload's model, or that wrapped for several processes."""
    scaler: torch.amp.GradScaler
    is_undoable: bool = True
    """Of the last step, as long as it has changed neither weights nor optimizer state: see `StepUndo`."""

    def prepare(self, microbatches: Sequence[Microbatch]) -> None:
        """Plan batches of these shapes now, if there is no plan for them yet."""
        for microbatch in microbatches:
            self.applied.prepare(to_device(microbatch, self.work.device))

    def take(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """Take a step; one whose loss or gradients are not finite in some process is not applied in any.

        Gradients are zeroed in place (``set_to_none=False``) on purpose: the budget counts them as held during the
        whole step, so freeing them in between would only make the measured peak look better than what the step needs.

        Raises:
            StepRanOutOfMemory: the device has no more memory.
            TrainingFailed: not all gradients were all-reduced.
        """
        work = self.work
        self.is_undoable = True
        plan = self.applied.active_plan or self.applied.plan
        with explaining_step_failures(microbatches, plan, work.budget, work.group):
            work.optimizer.zero_grad(set_to_none=False)
            total: Tensor | None = None
            for place, microbatch in enumerate(microbatches, 1):
                with all_reducing(self.model, last=place == len(microbatches)):
                    loss = self.applied.loss(self.model, to_device(microbatch, work.device))
                    self.scaler.scale(loss).backward()
                total = loss.detach() if total is None else total + loss.detach()
            assert total is not None
            require_all_reduced(self.model)
            # A loss scaler meets infinite gradients in the ordinary course of things, and skips their step.
            is_scaled = self.scaler.is_enabled()
            found = nonfinite_part(total, None if is_scaled else work.model)
            norm = None
            if work.clip_norm is not None:
                self.is_undoable = not is_scaled  # it remembers what it has unscaled
                self.scaler.unscale_(work.optimizer)
                norm = unsharded(torch.nn.utils.clip_grad_norm_(work.model.parameters(), work.clip_norm))
                if found is None and not is_scaled and not math.isfinite(norm.item()):
                    found = f"the norm of the gradients is {norm.item()}"
            if work.group.all_reduce_sum([found is not None])[0]:
                return StepResult(loss=total, gradient_norm=norm, nonfinite=found or "")
            self.is_undoable = False
            self.scaler.step(work.optimizer)
            self.scaler.update()
            return StepResult(loss=total, gradient_norm=norm)


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
    tighten: Callable[[int], tuple[Applied, Budget]]
    """Plans the run anew for a limit of bytes, in total, because a step ran out of memory."""
    folder: Path
    """Of the run."""
    skipped_steps: int = 0
    """Because something in them was not finite."""
    last_evaluation: Evaluation | None = None

    def run(self) -> None:
        """Take the steps that are left.

        Raises:
            TrainingFailed: a loss or weights are no numbers, or the memory or the disk is at an end.
            Interrupted: a signal came; the checkpoint is written.
        """
        first_step = self.steps_done
        undo = StepUndo(self.work.model)
        with (
            StopRequest(self.work.group) as stop,
            closing(self.work.stream(first_step, self.total_steps)) as batches,
            self.log.reporter.progress(first_step, self.total_steps),
        ):
            for step in range(first_step + 1, self.total_steps + 1):
                started = time.perf_counter()
                is_last = step == self.total_steps
                is_evaluated = self._is_evaluated(step)
                is_logged = is_evaluated or is_last or step == 1 or step % self.config.log_every == 0
                evaluation, is_best = None, False

                taken, lr = self._take(step, batches, undo, is_logged=is_logged)
                self.average.update(step)
                if isinstance(taken, MeasuredStep):
                    stop.expect_steps_of(taken.step_ms)
                    if is_evaluated:
                        evaluation = self._evaluate()
                        is_best = self.progress.note(evaluation, step, self.work.task)
                    self.log.add(step, lr=lr, measured=taken, evaluation=evaluation)
                else:
                    self.meter.add(time.perf_counter() - started)
                    self.log.reporter.advance(step)

                stops_early = evaluation is not None and self.progress.has_stalled(self.config.early_stop)
                is_finished = is_last or stops_early
                if is_finished:
                    self.guard.require_a_step(step - first_step, self.skipped_steps)
                if is_finished or is_best or step % self.config.save_every == 0:
                    self._save(step, is_best=is_best, may_fail=not is_finished)
                self.steps_done = step
                self.checkpoints.look()

                signal_number = stop.after_step(step)
                if signal_number is not None:
                    self.checkpoints.finish()
                    if self.checkpoints.last_step != step:
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

    def _take(
        self, step: int, batches: Iterator[list[Microbatch]], undo: StepUndo, *, is_logged: bool
    ) -> tuple[StepResult | MeasuredStep, float]:
        """Load a step's batch and take the step; returns what it gave, and its learning rate.

        Where that fails before the step has changed the weights, the state before it is saved.
        """
        whereabouts = self.work.group.whereabouts
        undo.note()
        self.steps.is_undoable = True
        try:
            whereabouts.text = f"loading the batch of step {step}"
            microbatches = next(batches)
            whereabouts.text = f"in step {step}"
            lr = self._set_lr(step)
            while True:
                try:
                    if is_logged:
                        taken: StepResult | MeasuredStep = self.meter.measure(self.steps, microbatches)
                    else:
                        taken = self.steps.take(microbatches)
                    break
                except StepRanOutOfMemory as problem:
                    found = str(problem)
                # Here no traceback holds anything of the step any more.
                self._tighten(step, found, undo)
            if taken.nonfinite is not None:
                self._note_nonfinite(step, taken.nonfinite, microbatches)
        except Exception as problem:
            self._save_before(step, problem, undo)
            raise
        return taken, lr

    def _tighten(self, step: int, found: str, undo: StepUndo) -> None:
        """Undo a step that ran out of memory, and install a plan that needs less; both leave no trace in the results.

        Raises:
            TrainingFailed: there is no such plan, or what the step has done cannot be undone.
        """
        what = f"{found}. It was step {step}, of samples {shown_samples(self._samples(step))}"
        is_undoable = self.work.group.is_single_process and self.steps.is_undoable
        if is_undoable:
            undo.undo()
        limit_bytes = limit_below(self.steps.applied, self.steps.work.budget)
        if limit_bytes is None:
            raise TrainingFailed(
                f"{what}. No plan needs less. Free memory on the device and go on with --resume auto, or use a smaller "
                f"batch or model in another run (--mark NAME)."
            )
        note_limit(self.folder, limit_bytes, what)
        if not is_undoable:
            raise TrainingFailed(
                f"{what}. The device has less than that to give, or something else took it. Go on from the last "
                f"checkpoint with --resume auto: plans are then made for {format_bytes(limit_bytes)} ({MEMORY_LIMIT})."
            )
        self.log.reporter.say(
            f"{what}: the step is undone, and taken again with a plan for {format_bytes(limit_bytes)}", important=True
        )
        try:
            applied, budget = self.tighten(limit_bytes)
        except (BudgetInfeasible, VerificationFailed, UnsupportedInput) as problem:
            raise TrainingFailed(f"{what}, and no plan that needs less can be made: {problem}") from None
        finally:
            undo.undo()  # planning may draw random numbers
        self.checkpoints.room_bytes = 0
        self.steps.applied = self.log.applied = applied
        self.steps.work = self.log.work = replace(self.work, budget=budget)

    def _note_nonfinite(self, step: int, found: str, microbatches: Sequence[Microbatch]) -> None:
        """Keep the batch of a step that was not applied, and end the run or go on.  All processes call this.

        Raises:
            NonFiniteStep: the run ends.
        """
        group, samples = self.work.group, self._samples(step)
        kept = keep_batch(self.folder, step, group.rank, samples, found, microbatches) if found else None
        everyones = group.all_gather((not found.startswith("the loss"), found, samples, kept))
        _, found, samples, kept = min(one for one in everyones if one[1])
        where = f" (kept in {kept})" if kept else ""
        what = f"{found} at step {step}, of samples {shown_samples(samples)}{where}"
        if self.config.on_nonfinite == "stop":
            before = "The last checkpoint is from before." if step > 1 else "There is no checkpoint yet."
            raise NonFiniteStep(
                f"{what}. That is not finite, so the step is not applied: the weights would be of no use, and they are "
                f"not saved. {before} Look at the samples. Try a smaller --lr in another run (--mark NAME), or go on "
                f"with --resume auto --on-nonfinite skip, which leaves out steps without finite gradients."
            )
        self.skipped_steps += 1
        self.log.reporter.say(f"step {step} is skipped: its loss or gradients are not finite; the weights stay. {what}")

    def _save_before(self, step: int, problem: Exception, undo: StepUndo) -> None:
        """Save the state before a step that failed, if all processes are here and it is not saved yet."""
        is_everyones = self.work.group.is_single_process or isinstance(problem, NonFiniteStep)
        if not (is_everyones and self.steps.is_undoable):
            return
        undo.undo()
        self.checkpoints.finish()
        if step - 1 in (0, self.checkpoints.last_step):
            return
        self._set_lr(step - 1)
        try:
            self._save(step - 1, is_best=False)
        except TightfitError as another:
            self.log.reporter.say(f"the state before the error could not be saved: {another}", important=True)
        else:
            self.log.reporter.say(
                f"an error ended the run: the checkpoint of step {step - 1} is written", important=True
            )

    def _samples(self, step: int) -> list[int]:
        return [number for part in self.work.loader.numbers(step - 1) for number in part]

    def _save(self, step: int, *, is_best: bool, may_fail: bool = False) -> None:
        """Save a checkpoint; if it ``may_fail``, the run does not wait for it, and goes on without it."""
        self.guard.require_finite_state(step)
        problem = self.checkpoints.save(step, is_best=is_best, may_go_on=may_fail)
        if problem is not None and not may_fail:
            raise TrainingFailed(f"{problem} {remedy_for(problem)}, and go on with --resume auto.")

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
        if self.checkpoints.held_bytes():  # no plan has room for both
            self.checkpoints.let_go()
        with self.average.in_place():
            evaluation = self.evaluator.evaluate()
        self.meter.note_evaluation(evaluation.peak_bytes)
        self.last_evaluation = evaluation
        return evaluation
