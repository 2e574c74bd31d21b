"""`verify`: is a planned step the plain step, bit for bit, and does its peak stay within the budget?

The plain run and the planned run start from the same state and see the same batch.  Plain runs twice: what differs
between its two runs is listed and never blamed on the plan; regions are compared instead.  The peak is measured by a
meter that knows nothing of the prediction.  Afterwards everything is as it was, bit for bit.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.fsdp import reducing_each_backward
from tightfit.errors import PlanMismatch, UnsupportedInput
from tightfit.installation.applied import Applied
from tightfit.installation.install import install
from tightfit.interrupts import waiting_interrupts
from tightfit.profiling.measure import measure_step
from tightfit.progress import progress, showing_when_long
from tightfit.records import Plan, Verdict
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.step.exclude import Exclude, excluded_paths
from tightfit.step.model import check_model
from tightfit.step.models import Models, as_model
from tightfit.step.open_autocast import as_it_runs_now, without_open_autocast
from tightfit.step.results import GRADIENT
from tightfit.step.step import LossFunction, Optimizers, Step, as_step
from tightfit.verification.comparison import Comparison, paths_called_again
from tightfit.verification.regions import compare_regions
from tightfit.verification.trial import Outcome, Trial

_log = logging.getLogger(__name__)

_TIMING_ROUNDS = 3


@showing_when_long()
@waiting_interrupts()
def verify(
    model: Models,
    batch: Any,
    plan: Plan,
    *,
    step: Step | None = None,
    loss: LossFunction | None = None,
    optimizer: Optimizers = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    exclude: Exclude = (),
    steps: int = 1,
    reference_budget_bytes: int | None = None,
) -> Verdict:
    """Run plain and planned steps from the same state, and compare their results bit by bit and the peak to the budget.

    Losses, gradients, parameters after the optimizer's step, buffers, attributes of modules and random state are
    compared.  Where plain needs more memory than allowed, or two plain steps give other gradients, calls of the planned
    regions are compared instead, plain and planned, from inputs taken from a planned step.  The model is afterwards
    what it was, bit for bit, and unplanned.

        plan = tightfit.Plan.load("plan.json")
        verdict = tightfit.verify(model, batch, plan, loss=loss_fn, optimizer=optimizer)
        assert verdict.ok, verdict.differing

    Args:
        model: the model that the plan was solved for, or the container of several, without a plan installed.
        batch: one batch as training gives it, of the shapes that the plan was solved for.
        plan: the plan to verify, from `solve`, `fit` or `Plan.load`.
        step: how a step runs, in one object; or give the keywords from `loss` to `clip_norm`, as for `measure`.
        loss: called with (model, batch), or with the container of several models; returns a scalar tensor.
        optimizer: one, several, or None.
        accumulation_steps: forward and backward passes for each optimizer step.
        autocast: dtype for torch.autocast around forward.
        clip_norm: total gradient norm to clip to before the optimizer step.
        exclude: modules that the plan was made to leave untouched, or patterns of their paths; by default the plan's.
        steps: optimizer steps to compare.
        reference_budget_bytes: memory that the *plain* run may take; by default the plan's budget. If plain needs more,
            regions are compared instead of whole steps.

    Of a model that is sharded by `fully_shard`, all its processes have to call this.

    Returns:
        `Verdict`. Its `ok` is True where gradients were compared, all that was compared is equal, and the measured peak
        is within the budget; None where no gradient or not every planned region could be compared, as `reason` says;
        else False.

    Raises:
        PlanMismatch: the plan is of another model, or was made with other modules excluded.
        UnsupportedInput: as `measure`; both `step` and single keywords; `steps` below 1; or a plan is installed.
    """
    if steps < 1:
        raise UnsupportedInput(f"steps={steps} compares nothing. Give steps=1 or more.")
    step = as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    one = as_model(model)
    check_model(one)
    step = as_it_runs_now(step.starting(one), one)
    excluded = excluded_paths(one, exclude)
    if excluded and excluded != plan.excluded:
        raise PlanMismatch(
            f"the plan was made with {', '.join(plan.excluded) or 'nothing'} excluded, and exclude names "
            f"{', '.join(excluded)}. What would be verified is not what was asked for. Measure and solve with this "
            "exclude=, or leave it out: a plan knows what it excludes."
        )
    with (
        without_open_autocast(one), reducing_each_backward(one),
        install(one, plan, step=step) as applied, Trial(one, batch, step) as trial,
    ):  # fmt: skip
        planned = trial.run_self_checked(applied, steps)
        return prove(
            trial,
            applied,
            planned,
            reference_budget_bytes=reference_budget_bytes,
            timing_rounds=_TIMING_ROUNDS,
        )


def prove(
    trial: Trial,
    applied: Applied,
    planned: Outcome,
    *,
    reference_budget_bytes: int | None = None,
    timing_rounds: int = 1,
) -> Verdict:
    """Compare the outcome of an installed plan with plain runs of the same trial, and regions where those do not do.

    `timing_rounds`: how often planned and plain steps are timed, which proves nothing.

    Regions are compared where plain does not fit, where it does not reproduce a gradient, and where something differs,
    to say in which of them that arises.
    """
    plan, group = applied.plan, trial.group
    allowed_bytes = max(plan.budget_bytes, reference_budget_bytes or 0)
    plain_peak_bytes = plan.plain_peak_bytes
    if plain_peak_bytes > allowed_bytes and plan.takes_over_checkpoints:
        plain_peak_bytes = _peak_as_it_is(trial, applied)
    plain_fits = all(group.all_gather(plain_peak_bytes <= allowed_bytes))
    found = Comparison(called_again=paths_called_again(plan))
    # A reference that may take more than the budget is not held to a cap on the budget.
    is_larger = allowed_bytes > plan.budget_bytes
    with device_for(trial.device).uncapped() if is_larger else nullcontext():
        plain = _plain_twice(trial, applied, planned.steps) if plain_fits else None
    plain_fits = plain is not None
    if plain is not None:
        first, again = plain
        plain_peak_bytes = max(first.peak_bytes, again.peak_bytes)
        found.add(first.results, again.results, planned.results)
        if any(group.all_gather(bool(found.unmeasured))):
            copied = frozenset(found.unmeasured.values())
            plainly = trial.run_plain(applied, planned.steps, copied=copied).results
            found.measure(plainly, trial.run_planned(applied, planned.steps, copied=copied).results)
        found = found.together(group)
    is_whole_step = bool(found.parameters)
    is_reproducible = not any(name.startswith(GRADIENT) for name in found.not_reproducible)
    if not plain_fits or found.differing or not is_reproducible:
        by_region = compare_regions(trial, applied, whole=plain_fits and not found.differing)
        found.include(by_region.together(group))
    unverified = () if is_whole_step and is_reproducible else tuple(found.unverified)
    within = all(group.all_gather(planned.peak_bytes <= plan.budget_bytes))
    share = found.share(trial.model, group)
    ok = not found.differing and within
    with device_for(trial.device).uncapped() if is_larger else nullcontext():
        step_ms, plain_ms = trial.times_ms(applied, plain=plain_fits, rounds=timing_rounds)
    plain_step_ms = plain_ms if plain_fits else plan.plain_step_ms
    plain_source = "measured" if plain_fits else "predicted"
    return Verdict(
        ok=None if ok and (unverified or not share) else ok,
        method="whole-step" if is_whole_step else "per-region",
        loss_equal=found.equal("loss") if plain_fits else None,
        gradients_equal=found.equal("gradient", "parameter", "output"),
        buffers_equal=found.equal("buffer", "attribute"),
        rng_equal=found.equal("random"),
        max_abs_difference=max(found.differing.values(), default=0.0) if found.names else None,
        compared_share=share,
        differing=tuple(sorted(found.differing)),
        plain_reproducible=not found.not_reproducible if found.names else None,
        not_reproducible=tuple(sorted(found.not_reproducible)),
        unverified=unverified,
        steps=planned.steps,
        budget_bytes=plan.budget_bytes,
        plain_peak_bytes=plain_peak_bytes,
        plain_peak_source=plain_source,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=planned.peak_bytes,
        plain_step_ms=plain_step_ms,
        plain_step_source=plain_source,
        step_ms=step_ms,
        overhead_ratio=step_ms / plain_step_ms - 1 if plain_step_ms else 0.0,
        replayed_ops=planned.replayed_ops,
        mismatches=planned.mismatches,
        tape_host_bytes=planned.tape_host_bytes,
    )


def _peak_as_it_is(trial: Trial, applied: Applied) -> int:
    """Return the predicted peak of the step in which the model checkpoints itself, which is the plain one here."""
    trial.go_to_start()
    with applied.paused():
        profile = measure_step(trial.model, trial.batch, trial.step, untimed=True, as_it_is=True)
    return simulate(ProfileIndex(profile), [None] * len(profile.regions)).peak_bytes


def _plain_twice(trial: Trial, applied: Applied, steps: int) -> tuple[Outcome, Outcome] | None:
    """Run the plain step twice; None where the device has no memory for it, though it was predicted to fit."""
    outcomes: list[Outcome] = []
    for number in range(2):
        progress("running the plain step", number, 2)
        outcome = None
        try:
            outcome = trial.run_plain(applied, steps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _log.info("the device has no memory for the plain step (%s); comparing regions", str(error))
        if not all(trial.group.all_gather(outcome is not None)):
            return None
        assert outcome is not None
        outcomes.append(outcome)
    first, again = outcomes
    return first, again
