"""Find a plan that keeps the budget: measure, solve, try it in a real step, and repair what was predicted wrongly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointError

from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.process_group import ProcessGroup
from tightfit.errors import BudgetInfeasible, VerificationFailed
from tightfit.installation.applied import Applied, install
from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.interrupts import waiting_interrupts
from tightfit.profiling.measure import measure_step, measure_together
from tightfit.records import Plan, Profile
from tightfit.records.decision import GradCheckpoint
from tightfit.replay.refusals import CannotRebuild
from tightfit.solver.solver import full_plan, plain_plan, solve
from tightfit.step.batch import describe_batch
from tightfit.step.fingerprint import fingerprint
from tightfit.step.step import Step
from tightfit.units import format_bytes
from tightfit.verification.trial import Outcome, Trial

_log = logging.getLogger(__name__)

#: A trial run and a new solve for each; the first one usually holds.
_MOST_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class FoundPlan:
    """A plan that kept the budget in a trial run, and what was learnt on the way."""

    plan: Plan
    profile: Profile
    """What it was solved from: the measured step, corrected by what trial runs showed."""
    resolved: ResolvedPlan
    """The plan, ready to be installed, with what its regions' self-checks found."""
    outcome: Outcome
    """What the trial run left behind, its measured peak among it."""


@waiting_interrupts()
def find_plan(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    budget_bytes: int,
    grad_checkpoint: GradCheckpoint = "auto",
    *,
    within_budget: bool = False,
) -> FoundPlan:
    """Find a plan as `search` does, and leave the model as it was, without a plan."""
    with Trial(model, batch, step) as trial:
        applied, found = search(trial, budget_bytes, grad_checkpoint, within_budget=within_budget)
        applied.remove()
    return found


def search(
    trial: Trial,
    budget_bytes: int,
    grad_checkpoint: GradCheckpoint = "auto",
    *,
    within_budget: bool = False,
    profile: Profile | None = None,
) -> tuple[Applied, FoundPlan]:
    """Find a plan whose trial run kept the budget, and leave it installed, with the trial going on.

    Args:
        trial: of the model, batch and step to plan for; whoever made it restores the model.
        budget_bytes: the most memory that a step may hold.
        grad_checkpoint: as for `fit`.
        within_budget: never run a step that is predicted to need more than the budget, not even to learn which budget
            would be enough.
        profile: as for `fit`.

    Raises:
        BudgetInfeasible, UnsupportedInput: as `fit`. No plan is installed.
        VerificationFailed: what a trial run recomputes is not what there was. No plan is installed.
    """
    group = trial.group  # its processes take each step, and so each decision about one, together
    is_known = all(group.all_gather(profile is not None and _is_of(profile, trial)))
    if profile is None or not is_known:
        profile = measure_together(trial.model, trial.batch, trial.step, budget_bytes=budget_bytes)
    for _ in range(_MOST_ROUNDS):
        chosen, infeasible = _choose_together(profile, budget_bytes, grad_checkpoint, group)
        if infeasible is not None:
            # Check that the budget which the error suggests works, if the device has that much memory.
            if within_budget or not all(group.all_gather(_has_room(trial, infeasible.required_bytes))):
                raise infeasible
            chosen = _choose(profile, infeasible.required_bytes, grad_checkpoint)
        assert chosen is not None  # either there is a plan, or it is said why not
        plan = chosen
        applied = install(trial.model, plan, step=trial.step, profile=profile)
        try:
            outcome, repaired = _try(trial, applied, profile)
        except BaseException:
            applied.remove()
            raise
        if outcome is not None and infeasible is None:
            return applied, FoundPlan(plan=plan, profile=profile, resolved=applied.resolved, outcome=outcome)
        applied.remove()
        if outcome is not None:
            break
        profile = repaired
    raise infeasible or BudgetInfeasible(
        plan.predicted_peak_bytes + profile.correction_bytes, budget_bytes, plan.peak_where
    )


def _has_room(trial: Trial, required_bytes: int) -> bool:
    return required_bytes <= Budget.of("auto", trial.device).total_bytes


def _is_of(profile: Profile, trial: Trial) -> bool:
    """Tell whether the profile is of this step, as far as it says."""
    return (
        profile.fingerprint == fingerprint(trial.model)
        and profile.batch == describe_batch(trial.batch)
        and profile.optimizer == ", ".join(type(optimizer).__name__ for optimizer in trial.step.optimizers)
        and profile.excluded == trial.step.excluded
        and profile.accumulation_steps == trial.step.accumulation_steps
        and device_for(profile.device).kind == device_for(trial.device).kind
        and profile.torch_version == torch.__version__
    )


def _choose_together(
    profile: Profile, budget_bytes: int, grad_checkpoint: GradCheckpoint, group: ProcessGroup
) -> tuple[Plan | None, BudgetInfeasible | None]:
    """Return the plan; else, where one of the processes has none, what the neediest of them needs."""
    plan: Plan | None = None
    problem: BudgetInfeasible | None = None
    try:
        plan = _choose(profile, budget_bytes, grad_checkpoint)
    except BudgetInfeasible as infeasible:
        problem = infeasible
    problems = [one for one in group.all_gather(problem) if one is not None]
    if problems:
        return None, max(problems, key=lambda one: one.required_bytes)
    return plan, None


def _choose(profile: Profile, budget_bytes: int, grad_checkpoint: GradCheckpoint) -> Plan:
    if grad_checkpoint == "auto":
        return solve(profile, budget_bytes)
    plan = (full_plan if grad_checkpoint == "full" else plain_plan)(profile, budget_bytes)
    if plan.predicted_peak_bytes > budget_bytes:
        raise BudgetInfeasible(plan.predicted_peak_bytes, budget_bytes, plan.peak_where, plan.breakdown)
    return plan


def _try(trial: Trial, applied: Applied, profile: Profile) -> tuple[Outcome | None, Profile]:
    """Run the installed plan.  Return the outcome if it held; else None, and a profile that knows better."""
    plan = applied.plan
    outcome: Outcome | None = None
    try:
        outcome = trial.run_self_checked(applied)
        measured_bytes, mismatches = outcome.peak_bytes, outcome.mismatches
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            measured_bytes, mismatches = plan.budget_bytes + max(plan.budget_bytes // 20, 1 << 20), 0
        elif applied.refused:  # replay would have been wrong, and a self-check said where
            measured_bytes, mismatches = 0, applied.statistics.mismatches + applied.statistics.unplanned_calls
        elif isinstance(error, CannotRebuild | CheckpointError):
            what = str(error).strip().splitlines()[0]
            raise VerificationFailed(f"it raises {type(error).__name__} where it recomputes ({what})") from error
        else:
            raise
    if mismatches and profile.is_sharded:  # such a model cannot be measured by running it; its tapes keep it right
        _log.warning("%d region calls ran other operations than measured: more may be held than planned", mismatches)
    elif mismatches and profile.method == "fake":  # first: positions that were refused are not this profile's either
        _log.info("%d region calls ran other operations than measured; measuring with a real step", mismatches)
        applied.remove()
        trial.restore()  # measuring begins with the model as it was given, and needs the memory
        return None, measure_step(trial.model, trial.batch, trial.step, concrete=True, budget_bytes=plan.budget_bytes)
    # What one process found, all heed: they have to come to the same decision.
    refused: dict[str, set[int]] = {}
    for positions in trial.group.all_gather(applied.refused):
        for key, found in positions.items():
            refused.setdefault(key, set()).update(found)
    if refused:
        _log.info("self-checks refused operations in %d regions; solving again", len(refused))
        return None, _without(profile, refused)
    over_bytes = max(trial.group.all_gather(measured_bytes - plan.budget_bytes))
    if over_bytes <= 0:
        return outcome, profile
    excess_bytes = max(trial.group.all_gather(measured_bytes - plan.predicted_peak_bytes))
    _log.info("the trial run took %s more than predicted; solving again", format_bytes(excess_bytes))
    correction_bytes = profile.correction_bytes + max(excess_bytes, over_bytes)
    return None, replace(profile, correction_bytes=correction_bytes)


def _without(profile: Profile, refused: Mapping[str, AbstractSet[int]]) -> Profile:
    """Return the profile with the refused operations marked as not replayable."""
    ops = list(profile.ops)
    for region in profile.regions:
        for position in refused.get(region.key, ()):
            if position >= region.op_count:  # this call ran more operations than the measured one
                continue
            index = region.first_op + position
            ops[index] = replace(ops[index], keep_reason="self-check: a second run gave other bits or changed inputs")
    return replace(profile, ops=tuple(ops))
