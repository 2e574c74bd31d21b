"""The steps of a run, one after the other: what is logged, judged and saved, and when the run ends."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit.device.memory import measure_peak, resident_bytes
from tightfit.train.checkpoint import random_state, save_checkpoint
from tightfit.train.config import TrainConfig
from tightfit.train.data.loader import Parts
from tightfit.train.ema import MovingAverage
from tightfit.train.evaluation import Evaluation, Evaluator
from tightfit.train.optimizer_step import StepOutcome, Stepper, TrainingFailed
from tightfit.train.optimizers import set_lr
from tightfit.train.parallel.fsdp import whole
from tightfit.train.precision import scaler_state
from tightfit.train.progress import Progress
from tightfit.train.reporter import Reporter, StepReport
from tightfit.train.run_folder import RunFolder
from tightfit.train.run_metrics import MetricsFile
from tightfit.train.schedules import lr_at
from tightfit.train.signals import Interrupted, StopRequest
from tightfit.train.stopwatch import Stopwatch
from tightfit.train.workload import Workload
from tightfit.units import format_bytes

#: How often several processes ask each other whether one got a signal: about so often, and after so many steps at most.
_ASK_EVERY_MS = 200.0
_ASK_AT_MOST_EVERY = 50


@dataclass(kw_only=True)
class Training:
    """See the module."""

    config: TrainConfig
    work: Workload
    stepper: Stepper
    evaluator: Evaluator | None
    average: MovingAverage | None
    progress: Progress
    folder: RunFolder
    metrics: MetricsFile | None
    """None: another process writes them."""
    reporter: Reporter
    identity: dict[str, object]
    total_steps: int
    beside_bytes: int
    """Held beside the step, and in the budget."""
    highest_peak_bytes: int = 0
    """Of all that was measured."""
    steps_done: int = 0
    last_evaluation: Evaluation | None = None
    _ask_every: int = 1
    """Steps between two questions to the other processes whether one got a signal."""
    _watch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self._watch = Stopwatch(self.work.device)

    def run(self, first_step: int) -> None:
        """Take the steps.

        Raises:
            TrainingFailed: the loss is no longer a number, or the memory is at an end.
            Interrupted: a signal came; the checkpoint is written.
        """
        self.steps_done = first_step
        self.reporter.start_progress(first_step, self.total_steps)
        batches = self.work.loader.stream(first_step, self.total_steps)
        with StopRequest() as stop:
            try:
                for done in range(first_step + 1, self.total_steps + 1):
                    started = time.perf_counter()
                    is_finished = self._step(next(batches), done, first_step, started)
                    self.steps_done = done
                    signal_number = self._signal(stop, done)
                    if signal_number is not None:
                        if not is_finished and not self._is_saved(done):
                            self._save(done, is_best=False)
                        raise Interrupted(
                            signal_number,
                            f"stopped by a signal after step {done}; the checkpoint is written. Go on with --resume "
                            f"auto.",
                        )
                    if is_finished:
                        break
            finally:
                batches.close()  # type: ignore[attr-defined]  # a generator: ends the workers
        self.reporter.stop_progress()

    def _signal(self, stop: StopRequest, done: int) -> int | None:
        """A signal that this process or another one got; all processes are told at the same step."""
        if self.work.group.is_single_process:
            return stop.signal_number
        if done % self._ask_every:
            return None
        return max(self.work.group.all_gather(stop.signal_number or 0)) or None

    def _step(self, parts: Parts, done: int, first_step: int, started: float) -> bool:
        """Take step ``done`` (the first is 1) and all that follows from it; True if the run ends with it."""
        config = self.config
        lr = lr_at(
            done - 1,
            total_steps=self.total_steps,
            highest=config.lr,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            min_ratio=config.min_lr_ratio,
        )
        set_lr(self.work.optimizer, lr)
        is_last = done == self.total_steps
        judges = self._judges(done, is_last)
        if not (done % config.log_every == 0 or done == first_step + 1 or is_last or judges):
            self.stepper.take(parts)
            self._after_step(done)
            self._watch.add(time.perf_counter() - started)
            self.reporter.advance(done)
            if self._is_saved(done):
                self._save(done, is_best=False)
            return False
        outcome, step_ms, peak_bytes = self._measured(parts)
        self._after_step(done)
        group = self.work.group
        everyones = group.all_gather((outcome.loss.item(), step_ms, peak_bytes))
        value = math.fsum(loss for loss, _, _ in everyones) / group.world_size
        step_ms, peak_bytes = max(ms for _, ms, _ in everyones), max(peak for _, _, peak in everyones)
        self.highest_peak_bytes = max(self.highest_peak_bytes, peak_bytes)
        self._ask_every = max(1, min(_ASK_AT_MOST_EVERY, int(_ASK_EVERY_MS / max(step_ms, 1e-3))))
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the loss is {value} at step {done}, so the weights are no longer of use. "
                f"The last checkpoint in {self.folder.checkpoints} is from before. Try a smaller --lr."
            )
        evaluation = self._judge() if judges else None
        is_best = evaluation is not None and self._note(evaluation, done)
        self._report(parts, done, lr, value, step_ms, peak_bytes, outcome, evaluation)
        patience = config.early_stop
        is_finished = is_last or (
            evaluation is not None and patience is not None and self.progress.evaluations_since_best >= patience
        )
        if is_finished or is_best or self._is_saved(done):
            self._save(done, is_best=is_best)
        if is_finished and not is_last:
            self.reporter.say(
                f"stopped early: {self.work.task.best.replace('_', ' ')} has not improved in "
                f"{self.progress.evaluations_since_best} evaluations, since step {self.progress.best_step}"
            )
        self._watch = Stopwatch(self.work.device)
        return is_finished

    def _measured(self, parts: Parts) -> tuple[StepOutcome, float, int]:
        """A step whose memory is measured. On a CPU that makes it slower, so its time counts only if there is no
        other.
        """
        work = self.work
        self._watch.settle()
        self.stepper.prepare(parts)  # planning runs the profiler, and so does the meter on a CPU: one at a time
        resident = self._resident_bytes(parts)
        started = time.perf_counter()
        outcome, peak_bytes = measure_peak(lambda: self.stepper.take(parts), resident, work.device)
        step_ms = self._watch.mean_ms or (time.perf_counter() - started) * 1000
        return outcome, step_ms, peak_bytes

    def _resident_bytes(self, parts: Parts) -> int:
        average_bytes = 0 if self.average is None else self.average.nbytes
        return resident_bytes(self.work.model, parts, self.work.optimizer) + average_bytes

    def _after_step(self, done: int) -> None:
        if self.average is not None:
            self.average.update(done)

    def _judges(self, done: int, is_last: bool) -> bool:
        if self.evaluator is None:
            return False
        every = self.config.eval_every
        return is_last or (done % every == 0 if every is not None else self.work.order.ends_epoch(done - 1))

    def _judge(self) -> Evaluation:
        assert self.evaluator is not None
        if self.average is None:
            evaluation = self.evaluator.evaluate()
        else:
            with self.average.in_place():
                evaluation = self.evaluator.evaluate()
        peak_bytes = evaluation.peak_bytes + (0 if self.average is None else self.average.nbytes)
        self.highest_peak_bytes = max(self.highest_peak_bytes, peak_bytes)
        self.last_evaluation = evaluation
        return evaluation

    def _note(self, evaluation: Evaluation, done: int) -> bool:
        """Whether the evaluation is the best so far."""
        task, progress = self.work.task, self.progress
        value = evaluation.metrics[task.best]
        if not task.is_better(value, progress.best):
            progress.evaluations_since_best += 1
            return False
        progress.best, progress.best_step, progress.evaluations_since_best = value, done, 0
        return True

    def _report(
        self,
        parts: Parts,
        done: int,
        lr: float,
        loss: float,
        step_ms: float,
        peak_bytes: int,
        outcome: StepOutcome,
        evaluation: Evaluation | None,
    ) -> None:
        work, plan = self.work, self.stepper.applied.active_plan
        norm = outcome.gradient_norm
        report = StepReport(
            step=done,
            total_steps=self.total_steps,
            epoch=work.order.epoch_of(done - 1),
            loss=loss,
            lr=lr,
            step_ms=step_ms,
            samples_per_second=len(work.order.indices(done - 1)) / step_ms * 1000,
            memory_now_bytes=self._resident_bytes(parts),
            peak_bytes=peak_bytes,
            budget_bytes=work.budget_bytes,
            recompute_ratio=0.0 if plan is None else 1 - plan.plain_step_ms / max(plan.predicted_step_ms, 1e-9),
            gradient_norm=None if norm is None else norm.item(),
            evaluation=None if evaluation is None else evaluation.metrics,
        )
        self.reporter.step(report)
        line: dict[str, Any] = {
            "step": done,
            "epoch": report.epoch,
            "loss": loss,
            "lr": lr,
            "step_ms": step_ms,
            "peak_bytes": peak_bytes,
            "budget_bytes": work.budget_bytes,
            "samples_per_second": report.samples_per_second,
            "memory_now_bytes": report.memory_now_bytes,
            "recompute_ratio": report.recompute_ratio,
        }
        if report.gradient_norm is not None:
            line["gradient_norm"] = report.gradient_norm
        if evaluation is not None:
            line["eval"] = {**evaluation.metrics, "samples": evaluation.samples, "peak_bytes": evaluation.peak_bytes}
        if self.metrics is not None:
            self.metrics.add(line)

    def _is_saved(self, done: int) -> bool:
        return done % self.config.save_every == 0

    def _save(self, done: int, *, is_best: bool) -> None:
        """Rank 0 writes, and all know whether it could."""
        group = self.work.group
        random_states = group.all_gather(random_state())
        average = None if self.average is None else self.average.state_dict()
        state = whole(
            {"model": self.work.model.state_dict(), "optimizer": self.work.optimizer.state_dict(), "average": average},
            keep=group.is_main_process,
        )
        group.run_on_all(
            lambda: self._write(done, state, random_states, is_best=is_best) if group.is_main_process else None
        )

    def _write(self, done: int, state: dict[str, Any], random_states: list[dict[str, Any]], *, is_best: bool) -> None:
        further: dict[str, Any] = {"scaler": scaler_state(self.stepper.scaler)}
        if state["average"] is not None:
            further["average"] = state["average"]
        try:
            save_checkpoint(
                self.folder.checkpoints,
                step=done,
                identity=self.identity,
                progress=self.progress.to_json(),
                random_states=random_states,
                model=state["model"],
                optimizer=state["optimizer"],
                further=further,
                is_best=is_best,
            )
        except (OSError, RuntimeError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else _disk_trouble(problem)
            if reason is None:
                raise
            held = sum(tensor.nbytes for tensor in state["model"].values() if torch.is_tensor(tensor))
            raise TrainingFailed(
                f"the checkpoint of step {done} could not be written to {self.folder.checkpoints} ({reason}); the "
                f"weights alone take {format_bytes(held)}. The checkpoints written before are whole. Make room there "
                f"and go on with --resume auto."
            ) from problem


def _disk_trouble(problem: RuntimeError) -> str | None:
    """What PyTorch's file writer says when the disk is full; None if the error is another."""
    text = str(problem)
    return text.splitlines()[0] if "PytorchStreamWriter" in text or "unexpected pos" in text else None
