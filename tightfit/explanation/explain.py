"""`explain`: who holds the memory of a step, and what would help."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tightfit.device.budget import Budget
from tightfit.device.described.cards import Card
from tightfit.explanation.code import Script
from tightfit.explanation.elsewhere import on_card
from tightfit.explanation.explanation import Explanation, Seen
from tightfit.explanation.knobs import knobs_of
from tightfit.explanation.predicted import predicted_breakdown
from tightfit.explanation.ways import Way, find_ways
from tightfit.interrupts import waiting_interrupts
from tightfit.planning.search import search
from tightfit.profiling.measure import measure_step
from tightfit.records import Profile
from tightfit.solver.solver import solver_of
from tightfit.step.batch import describe_batch
from tightfit.step.exclude import Exclude, excluded_paths
from tightfit.step.model import check_model, device_of
from tightfit.step.models import Models, as_model
from tightfit.step.open_autocast import as_it_runs_now, without_open_autocast
from tightfit.step.step import LossFunction, Optimizers, Step, as_step
from tightfit.verification.trial import Trial

_log = logging.getLogger(__name__)


@waiting_interrupts()
def explain(
    model: Models,
    batch: Any,
    *,
    step: Step | None = None,
    loss: LossFunction | None = None,
    optimizer: Optimizers = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    exclude: Exclude = (),
    budget: int | str | Budget | None = None,
) -> Explanation:
    """Explain the memory of one training step: by component and by module at its peak, and what would help.

    The step is measured as `measure` does, without running it where that is possible; model, batch, optimizer and
    random state are afterwards what they were.  Each way that would help is this step, planned or measured again; the
    first is run once, if it is a plan, and its peak is the measured one.

        print(tightfit.explain(model, batch, loss=loss_fn, optimizer=optimizer))

    Args:
        model: any module with parameters that train, or several as for `fit`, all on one device; not changed.
        batch: one batch as training will give it. Without `loss`, a mapping becomes keyword arguments, a tuple
            positional arguments, anything else one argument.
        step: how a step runs, in one object; or give the keywords from `loss` to `clip_norm`.
        loss: called with (model, batch), returns a scalar tensor. None: the model's result, or its ``loss``, is one.
        optimizer: one, several, or None (then its state and step are in no figure).
        accumulation_steps: forward and backward passes for each optimizer step.
        autocast: dtype for torch.autocast around forward.
        clip_norm: total gradient norm to clip to before the optimizer step.
        exclude: modules that are to be left untouched, or patterns of their paths such as ``layers.*.attn``.
        budget: the memory that there is for a step, as for `fit`: what fits it is ranked first.

    Returns:
        `Explanation`; ``str()`` of it is the text that `tightfit explain` prints.

    Raises:
        UnsupportedInput: as `measure`.
    """
    step = as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    one = as_model(model)
    check_model(one)
    step = as_it_runs_now(replace(step, excluded=excluded_paths(one, exclude)).starting(one), one)
    target_bytes = None if budget is None else Budget.of(budget, device_of(one)).step_bytes
    script = Script(
        optimizers=("optimizer",) if step.optimizers else (),
        needs_loss=step.loss is not None,
        accumulation_steps=step.accumulation_steps,
        autocast=step.autocast,
        clip_norm=step.clip_norm,
    )
    with without_open_autocast(one):
        return explain_step(one, batch, step, script, target_bytes=target_bytes)


def explain_step(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    script: Script,
    *,
    target_bytes: int | None = None,
    room_bytes: int | None = None,
    seen: Seen | None = None,
    notes: tuple[str, ...] = (),
    around: Sequence[torch.nn.Module] = (),
    card: Card | None = None,
) -> Explanation:
    """Explain a step, which a script may have been seen to take.

    `room_bytes` is what measuring may take, `around` as for `knobs_of`, `card` a GPU that is not here, of which is said
    whether the step would fit.
    """
    if card is not None:
        notes = (*notes, on_card(model, batch, step, card))
    profile = measure_step(model, batch, step, budget_bytes=room_bytes, as_it_is=True)
    predicted = predicted_breakdown(profile, model, step.optimizers)
    now = solver_of(profile).plain(0)
    if profile.checkpoints:
        # The model checkpoints itself: a plan decides about that, too.
        profile = measure_step(model, batch, step, budget_bytes=room_bytes)
    knobs = knobs_of(
        model,
        step.optimizers,
        profile,
        autocast=step.autocast or script.autocast,
        accumulation_steps=step.accumulation_steps,
        clip_norm=step.clip_norm,
        around=around,
    )
    ways = find_ways(
        model,
        batch,
        step,
        profile,
        script,
        now=now,
        target_bytes=target_bytes,
        room_bytes=room_bytes,
        is_optimizer_peak=predicted.moment == "optimizer step",
    )
    ways = (*(_tried(way, model, batch, step, profile) for way in ways[:1]), *ways[1:])
    if estimated := sorted({one.name.removesuffix(".default") for one in profile.signatures if one.note}):
        notes = (
            *notes,
            f"there was no room to run {', '.join(estimated)} alone: what they hold inside is estimated, and so are "
            "the totals",
        )
    return Explanation(
        model=profile.model,
        batch=describe_batch(batch),
        device=profile.device,
        step=predicted,
        step_ms=now.plain_step_ms,
        seen=seen,
        target_bytes=target_bytes,
        knobs=knobs,
        ways=ways,
        notes=notes,
    )


def _tried(way: Way, model: torch.nn.Module, batch: Any, step: Step, profile: Profile) -> Way:
    """Run the step of a plan once, and return what it took; as predicted where it is no plan, or cannot be run here."""
    if way.budget_bytes is None:
        return way
    try:
        with Trial(model, batch, step) as trial:
            applied, found = search(trial, way.budget_bytes, within_budget=True, profile=profile)
            applied.remove()
    except Exception as problem:  # of the script's own code, too
        _log.info("the plan for %d bytes was not tried: %s", way.budget_bytes, problem)
        return way
    return replace(way, peak_bytes=found.outcome.peak_bytes, step_ms=found.plan.predicted_step_ms, plan=found.plan)
