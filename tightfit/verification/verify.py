"""`verify`: is a planned step the plain step, bit for bit, and does its peak stay within the budget?

The plain run and the planned run start from the same state and see the same batch.  Plain runs twice: what differs
between its two runs is listed and never blamed on the plan.  The peak is measured by a meter that knows nothing of the
prediction.  Afterwards everything is as it was, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch

from tightfit.errors import UnsupportedInput
from tightfit.installation.applied import Applied, apply
from tightfit.interrupts import waiting_interrupts
from tightfit.records import Plan, Verdict
from tightfit.step.host_copy import difference, same_contents
from tightfit.step.step import LossFunction, Optimizers, Step, as_step
from tightfit.verification.regions import RegionComparison, compare_regions
from tightfit.verification.trial import Outcome, Trial


@waiting_interrupts()
def verify(
    model: torch.nn.Module,
    batch: Any,
    plan: Plan,
    *,
    step: Step | None = None,
    loss: LossFunction | None = None,
    optimizer: Optimizers = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    steps: int = 1,
    reference_budget_bytes: int | None = None,
) -> Verdict:
    """Run plain and planned steps from the same state, and compare their results bit by bit and the peak to the budget.

    Losses, gradients, parameters after the optimizer's step, buffers and random state are compared.  Where plain needs
    more memory than allowed, one call of each class of equal regions is compared instead, plain and planned, from
    inputs taken from a planned step.  The model is afterwards what it was, bit for bit, and unplanned.

        plan = tightfit.Plan.load("plan.json")
        verdict = tightfit.verify(model, batch, plan, loss=loss_fn, optimizer=optimizer)
        assert verdict.ok, verdict.differing

    Args:
        model: the model that the plan was solved for, without a plan installed.
        batch: one batch as training gives it, of the shapes that the plan was solved for.
        plan: the plan to verify, from `solve`, `fit` or `Plan.load`.
        step: how a step runs, in one object; or give the keywords from `loss` to `clip_norm`, as for `measure`.
        loss: called with (model, batch), returns a scalar tensor.
        optimizer: one, several, or None.
        accumulation_steps: forward and backward passes for each optimizer step.
        autocast: dtype for torch.autocast around forward.
        clip_norm: total gradient norm to clip to before the optimizer step.
        steps: optimizer steps to compare.
        reference_budget_bytes: memory that the *plain* run may take; by default the plan's budget. If plain needs more,
            regions are compared instead of whole steps.

    Of a model that is sharded by `fully_shard`, all its processes have to call this.

    Returns:
        `Verdict`. Its `ok` is True where all was compared and is equal, and the measured peak is within the budget;
        None where a part could not be compared; else False.

    Raises:
        PlanMismatch: the plan is of another model.
        UnsupportedInput: as `measure`; both `step` and single keywords; `steps` below 1; or a plan is installed.
    """
    if steps < 1:
        raise UnsupportedInput(f"steps={steps} compares nothing. Give steps=1 or more.")
    step = as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    with apply(model, plan, step=step) as applied, Trial(model, batch, step) as trial:
        planned = trial.run_self_checked(applied, steps)
        return prove(trial, applied, planned, reference_budget_bytes=reference_budget_bytes)


def prove(trial: Trial, applied: Applied, planned: Outcome, *, reference_budget_bytes: int | None = None) -> Verdict:
    """Compare the outcome of an installed plan with plain runs, or regions, of the same trial."""
    plan = applied.plan
    allowed_bytes = max(plan.budget_bytes, reference_budget_bytes or 0)
    if all(trial.group.all_gather(plan.plain_peak_bytes <= allowed_bytes)):
        return _whole_step(trial, applied, planned)
    return _per_region(trial, applied, planned)


def _whole_step(trial: Trial, applied: Applied, planned: Outcome) -> Verdict:
    first = trial.run_plain(applied, planned.steps)
    second = trial.run_plain(applied, planned.steps)
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
    step_ms, plain_ms = trial.times_ms(applied, plain=True)
    plan = applied.plan
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
        steps=planned.steps,
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


def _per_region(trial: Trial, applied: Applied, planned: Outcome) -> Verdict:
    plan = applied.plan
    if trial.group.is_single_process:
        found = compare_regions(trial.model, applied, lambda inside: trial.run_planned(applied, inside=inside))
    else:  # a region's weights are there only within a step
        found = RegionComparison(unverified=[region.key for region in plan.regions if region.recipe >= 0])
    step_ms, _ = trial.times_ms(applied, plain=False)
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
        steps=planned.steps,
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
