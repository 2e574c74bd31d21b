"""Steps taken from one fixed state, plain and planned, with their peaks and results; afterwards all is put back."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from tightfit.device import memory as meter
from tightfit.distributed.dtensor import local
from tightfit.distributed.fsdp import group_of
from tightfit.installation.applied import Applied
from tightfit.records import DROPPED_VALUE_HOST_BYTES, TAPED_OP_HOST_BYTES
from tightfit.step.host_copy import CopyFile, HostCopy
from tightfit.step.model import device_of, give_gradients
from tightfit.step.snapshot import RandomState, TrainingState
from tightfit.step.step import Step

_TIMING_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of several steps left behind, copied out of the device's memory."""

    tensors: dict[str, HostCopy]
    random_state: RandomState
    peak_bytes: int
    replayed_ops: int
    mismatches: int
    tape_host_bytes: int


class Trial:
    """Runs steps from one fixed state.  `restore` must be called at the end."""

    def __init__(self, model: torch.nn.Module, batch: Any, applied: Applied, spec: Step) -> None:
        self.model = model
        self.batch = batch
        self.applied = applied
        self.plan = applied.plan
        self.device = device_of(model)
        self.group = group_of(model)
        """Those who have to take each step together."""
        self._spec = spec
        self._planned_spec = replace(spec, around_loss=lambda: applied.step(batch))
        self._given = TrainingState(model, spec.optimizers, also=(batch,))
        try:
            self._reach_steady_state()
            self._start = TrainingState(model, spec.optimizers, also=(batch,))
        except BaseException:
            self.restore()
            raise

    def _reach_steady_state(self) -> None:
        # Steady state: gradients resident and optimizer state allocated, as in every step but the first.
        give_gradients(self.model)
        for optimizer in self._spec.optimizers:
            optimizer.step()

    def restore(self) -> None:
        """Put the model back as it was given."""
        self._given.restore()

    def guarded(self, steps: int = 1) -> Outcome:
        """The planned run alone.  Its first pass lets every region calibrate; only then is anything measured."""
        if any(self.group.gather(self.applied.installed)):
            self._start.restore()
            self._planned_spec.run(self.model, self.batch)
        return self.run(steps, planned=True)

    def run(self, steps: int, *, planned: bool, inside: AbstractContextManager[None] | None = None) -> Outcome:
        """`steps` steps from the fixed state, inside a further context."""
        self._start.restore()
        spec = self._planned_spec if planned else self._spec
        counts = self.applied.statistics
        tensors: dict[str, HostCopy] = {}
        copies = CopyFile()
        peak_bytes = 0
        with inside or nullcontext(), nullcontext() if planned else self.applied.paused():
            for step in range(1, steps + 1):
                counts.reset()
                resident = meter.resident_bytes(self.model, self.batch, self._spec.optimizers)
                step_loss, peak = meter.measure_peak(lambda: spec.run(self.model, self.batch), resident, self.device)
                peak_bytes = max(peak_bytes, peak)
                tensors[f"loss of step {step}"] = HostCopy(step_loss, copies)
                if step < steps:
                    for parameter in self.model.parameters():
                        if parameter.grad is not None:
                            parameter.grad.zero_()
        tape_bytes = counts.taped_ops * TAPED_OP_HOST_BYTES + counts.dropped_slots * DROPPED_VALUE_HOST_BYTES
        replayed, mismatches = counts.replayed_ops, counts.mismatches + counts.unplanned_calls
        for name, parameter in self.model.named_parameters():
            tensors[f"parameter {name}"] = HostCopy(local(parameter), copies)
            if parameter.grad is not None:
                tensors[f"gradient of {name}"] = HostCopy(local(parameter.grad), copies)
        for name, buffer in self.model.named_buffers():
            tensors[f"buffer {name}"] = HostCopy(buffer, copies)
        return Outcome(
            tensors=tensors,
            random_state=RandomState(),
            peak_bytes=peak_bytes,
            replayed_ops=replayed,
            mismatches=mismatches,
            tape_host_bytes=tape_bytes,
        )

    def times_ms(self, *, plain: bool) -> tuple[float, float]:
        """Median step times (planned, plain), the runs interleaved; plain is 0 unless asked for."""
        planned_ms: list[float] = []
        plain_ms: list[float] = []
        for _ in range(_TIMING_ROUNDS):
            self._start.restore()
            planned_ms.append(meter.time_ms(lambda: self._planned_spec.run(self.model, self.batch), self.device))
            if plain:
                self._start.restore()
                with self.applied.paused():
                    plain_ms.append(meter.time_ms(lambda: self._spec.run(self.model, self.batch), self.device))
        return statistics.median(planned_ms), statistics.median(plain_ms) if plain else 0.0
