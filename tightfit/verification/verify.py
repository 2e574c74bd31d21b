"""`verify`: is a planned step the plain step, bit for bit, and does its peak stay within the budget?

The plain run and the planned run start from the same state and see the same batch.  Plain runs twice: what differs
between its two runs is listed and never blamed on the plan.  The peak is measured by `meter`, which knows nothing of
the prediction.  Afterwards everything is as it was, bit for bit.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from tightfit.device import memory as meter
from tightfit.distributed.dtensor import local_shard
from tightfit.distributed.fsdp import process_group_of
from tightfit.errors import UnsupportedInput
from tightfit.installation.applied import Applied, apply
from tightfit.records import DROPPED_VALUE_HOST_BYTES, TAPED_OP_HOST_BYTES, Plan, Verdict
from tightfit.step.host_copy import CopyFile, HostCopy, difference, same_contents
from tightfit.step.snapshot import RandomState, TrainingState
from tightfit.step.step import LossFunction, StepSpec, as_optimizers, device_of, give_gradients
from tightfit.verification.regions import RegionComparison, compare_regions

_TIMING_ROUNDS = 3


def verify(
    model: torch.nn.Module,
    batch: Any,
    plan: Plan,
    *,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    steps: int = 1,
    reference_budget_bytes: int | None = None,
) -> Verdict:
    """Run `steps` optimizer steps plain and planned, from the same state, and compare.

    Args:
        model, batch, loss, optimizer, accumulation_steps, autocast, clip_norm: as for `measure`.
        plan: the plan to verify. It must not be installed on the model.
        steps: optimizer steps to compare.
        reference_budget_bytes: memory that the *plain* run may take; by default the plan's budget. If plain needs more,
            each region class is compared on its own instead, inside the budget.

    Raises:
        PlanMismatch: the plan is of another model.
        UnsupportedInput: as `measure`.
    """
    spec = StepSpec(
        loss=loss,
        optimizers=as_optimizers(optimizer),
        accumulation_steps=accumulation_steps,
        autocast=autocast,
        clip_norm=clip_norm,
    )
    with apply(model, plan, spec=spec) as applied:
        return verify_applied(model, batch, applied, spec, steps=steps, reference_budget_bytes=reference_budget_bytes)


def verify_applied(
    model: torch.nn.Module,
    batch: Any,
    applied: Applied,
    spec: StepSpec,
    *,
    steps: int = 1,
    reference_budget_bytes: int | None = None,
) -> Verdict:
    """`verify` for a plan that is installed already."""
    if steps < 1:
        raise UnsupportedInput(f"steps={steps} compares nothing. Give steps=1 or more.")
    plan = applied.plan
    allowed_bytes = max(plan.budget_bytes, reference_budget_bytes or 0)
    trial = Trial(model, batch, applied, spec)
    try:
        guarded = trial.guarded(steps)
        if all(trial.group.all_gather(plan.plain_peak_bytes <= allowed_bytes)):
            return _whole_step(trial, guarded, steps)
        return _per_region(trial, guarded, steps)
    finally:
        trial.restore()


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

    def __init__(self, model: torch.nn.Module, batch: Any, applied: Applied, spec: StepSpec) -> None:
        self.model = model
        self.batch = batch
        self.applied = applied
        self.plan = applied.plan
        self.device = device_of(model)
        self.group = process_group_of(model)
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
        if any(self.group.all_gather(self.applied.installed)):
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
            tensors[f"parameter {name}"] = HostCopy(local_shard(parameter), copies)
            if parameter.grad is not None:
                tensors[f"gradient of {name}"] = HostCopy(local_shard(parameter.grad), copies)
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


def _whole_step(trial: Trial, planned: Outcome, steps: int) -> Verdict:
    first = trial.run(steps, planned=False)
    second = trial.run(steps, planned=False)
    not_reproducible = {name for name, t in first.tensors.items() if not same_contents(t, second.tensors[name])}
    differing = {
        name: difference(t, planned.tensors.get(name))
        for name, t in first.tensors.items()
        if name not in not_reproducible and not same_contents(t, planned.tensors.get(name))
    }
    rng_equal = first.random_state.equals(planned.random_state)
    if not trial.group.is_single_process:  # each has compared its part
        everyones = trial.group.all_gather((differing, not_reproducible, rng_equal))
        not_reproducible = {name for _, names, _ in everyones for name in names}
        differing = {}
        for found, _, _ in everyones:
            for name, value in found.items():
                if name not in not_reproducible:
                    differing[name] = max(value, differing.get(name, 0.0))
        rng_equal = all(equal for _, _, equal in everyones)
    step_ms, plain_ms = trial.times_ms(plain=True)
    plan = trial.plan
    equal = not differing and rng_equal
    return Verdict(
        ok=equal and planned.peak_bytes <= plan.budget_bytes,
        method="whole-step",
        loss_equal=_none_of(differing, "loss"),
        gradients_equal=_none_of(differing, "gradient", "parameter"),
        buffers_equal=_none_of(differing, "buffer"),
        rng_equal=rng_equal,
        max_abs_difference=max(differing.values(), default=0.0),
        differing=tuple(sorted(differing)),
        plain_reproducible=not not_reproducible,
        not_reproducible=tuple(sorted(not_reproducible)),
        unverified=(),
        steps=steps,
        budget_bytes=plan.budget_bytes,
        plain_peak_bytes=max(first.peak_bytes, second.peak_bytes),
        plain_peak_source="measured",
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=planned.peak_bytes,
        plain_step_ms=plain_ms,
        plain_step_source="measured",
        step_ms=step_ms,
        overhead_ratio=step_ms / plain_ms - 1 if plain_ms else 0.0,
        replayed_ops=planned.replayed_ops,
        mismatches=planned.mismatches,
        tape_host_bytes=planned.tape_host_bytes,
    )


def _per_region(trial: Trial, planned: Outcome, steps: int) -> Verdict:
    plan = trial.plan
    if trial.group.is_single_process:
        found = compare_regions(trial.model, trial.applied, lambda inside: trial.run(1, planned=True, inside=inside))
    else:  # a region's weights are there only within a step
        found = RegionComparison(unverified=[region.key for region in plan.regions if region.recipe >= 0])
    step_ms, _ = trial.times_ms(plain=False)
    within = planned.peak_bytes <= plan.budget_bytes
    ok: bool | None = not found.differing and within
    if ok and found.unverified:
        ok = None
    plain_ms = plan.plain_step_ms
    return Verdict(
        ok=ok,
        method="per-region",
        loss_equal=None,
        gradients_equal=_none_of(found.differing, "gradient", "output") if found.compared else None,
        buffers_equal=_none_of(found.differing, "buffer") if found.compared else None,
        rng_equal=_none_of(found.differing, "random") if found.compared else None,
        max_abs_difference=max(found.differing.values(), default=0.0) if found.compared else None,
        differing=tuple(sorted(found.differing)),
        plain_reproducible=not found.not_reproducible if found.compared else None,
        not_reproducible=tuple(sorted(found.not_reproducible)),
        unverified=tuple(found.unverified),
        steps=steps,
        budget_bytes=plan.budget_bytes,
        plain_peak_bytes=plan.plain_peak_bytes,
        plain_peak_source="predicted",
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=planned.peak_bytes,
        plain_step_ms=plain_ms,
        plain_step_source="predicted",
        step_ms=step_ms,
        overhead_ratio=step_ms / plain_ms - 1 if plain_ms else 0.0,
        replayed_ops=planned.replayed_ops,
        mismatches=planned.mismatches,
        tape_host_bytes=planned.tape_host_bytes,
    )


def _none_of(differing: dict[str, float], *kinds: str) -> bool:
    return not any(name.startswith(kinds) or f": {kind}" in name for name in differing for kind in kinds)
