"""Measuring the steps of a run: the time of all of them, and the memory of those that are logged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tightfit.device import device_for
from tightfit.device.memory import measure_peak, resident_bytes
from tightfit.step.microbatch import Microbatch
from tightfit.train.ema import MovingAverage
from tightfit.train.workload import Workload


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gave; tensors on the device, so that nobody waits for it."""

    loss: Tensor
    """Mean over the whole batch; of several processes, the part of this one, times their number."""
    gradient_norm: Tensor | None
    """Before clipping; None: gradients are not clipped."""
    nonfinite: str | None = None
    """What was not finite, in this process, or empty, in another one: the weights are as before. None: all was."""


class TakesSteps(Protocol):
    """Takes optimizer steps."""

    def prepare(self, microbatches: Sequence[Microbatch]) -> None:
        """Plan batches of these shapes now, if there is no plan for them yet."""

    def take(self, microbatches: Sequence[Microbatch]) -> StepResult:
        """Take a step."""


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A measured step, over all processes."""

    loss: float
    """Mean over the whole batch."""
    gradient_norm: float | None
    step_ms: float
    """Of the slowest process."""
    peak_bytes: int
    """Of the process that needs most."""
    resident_bytes: int
    """Held after the step: parameters, gradients, optimizer state, batch, moving average."""
    nonfinite: str | None
    """See `StepResult`."""


class StepMeter:
    """Times all steps, and meters the memory of some.

    Metering makes a step on a CPU slower, so a metered step's time counts only if there were no others before it.
    """

    def __init__(self, work: Workload, average: MovingAverage) -> None:
        self._work = work
        self._average = average
        self._seconds = 0.0
        self._steps = 0
        self.highest_peak_bytes = 0
        """Of all that was metered, steps and evaluations."""
        self.beside_bytes: Callable[[], int] = lambda: 0
        """What else is held on the device now: a copy that is being saved."""

    def add(self, seconds: float) -> None:
        """Note that a step took so long, as far as this process can tell without waiting for the device."""
        self._seconds += seconds
        self._steps += 1

    def measure(self, steps: TakesSteps, microbatches: Sequence[Microbatch]) -> MeasuredStep:
        """Take a step under the meter; its time is the mean of the steps since the last measured one."""
        self._settle()
        steps.prepare(microbatches)  # planning runs the profiler, and so does the meter on a CPU: one at a time
        before_bytes = self._resident_bytes(microbatches)
        started = time.perf_counter()
        result, peak_bytes = measure_peak(
            lambda: steps.take(microbatches), before_bytes, self._work.device, from_empty=False
        )
        seconds = self._seconds / self._steps if self._steps else time.perf_counter() - started
        self._seconds, self._steps = 0.0, 0
        group = self._work.group
        everyones = group.all_gather((result.loss.item(), seconds, peak_bytes))
        measured = MeasuredStep(
            loss=math.fsum(loss for loss, _, _ in everyones) / group.world_size,
            gradient_norm=None if result.gradient_norm is None else result.gradient_norm.item(),
            step_ms=1e3 * max(seconds for _, seconds, _ in everyones),
            peak_bytes=max(peak for _, _, peak in everyones),
            resident_bytes=self._resident_bytes(microbatches),
            nonfinite=result.nonfinite,
        )
        self.highest_peak_bytes = max(self.highest_peak_bytes, measured.peak_bytes)
        return measured

    def note_evaluation(self, peak_bytes: int) -> None:
        """Note the peak of an evaluation, the moving average not included."""
        self.highest_peak_bytes = max(self.highest_peak_bytes, peak_bytes + self._beside_bytes())

    def _resident_bytes(self, microbatches: Sequence[Microbatch]) -> int:
        return resident_bytes(self._work.model, microbatches, self._work.optimizer) + self._beside_bytes()

    def _beside_bytes(self) -> int:
        return self._average.nbytes + self.beside_bytes()

    def _settle(self) -> None:
        """Wait for the device, so that its work counts for the steps that handed it over."""
        if self._steps:
            started = time.perf_counter()
            device_for(self._work.device).synchronize()
            self._seconds += time.perf_counter() - started
