"""`fit`: measure, solve, apply, verify, and repair until the measured peak keeps the budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch

from tightfit.device import memory as meter
from tightfit.device.budget import resolve_budget
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.fsdp import group_of
from tightfit.distributed.process_group import Group
from tightfit.errors import BudgetInfeasible, UnsupportedInput
from tightfit.installation.applied import Applied, apply
from tightfit.planning.plan_cache import GradCheckpoint, PlanCache
from tightfit.profiling.measure import measure_step, measure_together
from tightfit.records import Plan, Profile
from tightfit.solver.solver import full_plan, plain_plan, solve
from tightfit.step.batch import describe_batch
from tightfit.step.fingerprint import fingerprint
from tightfit.step.model import check_model, device_of
from tightfit.step.step import LossFunction, Optimizers, Step, as_step
from tightfit.units import format_bytes
from tightfit.verification.trial import Trial
from tightfit.verification.verify import verify_applied

_log = logging.getLogger(__name__)

#: A guarded run and a new solve for each; the first one usually holds.
_MOST_ROUNDS = 6


def fit(
    model: torch.nn.Module,
    batch: Any,
    *,
    budget: int | str | None = None,
    step: Step | None = None,
    loss: LossFunction | None = None,
    optimizer: Optimizers = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    grad_checkpoint: GradCheckpoint = "auto",
    reference_budget_bytes: int | None = None,
    profile: Profile | None = None,
) -> Applied:
    """Make training steps of `model` on batches like `batch` fit `budget`, and prove it.

    Measures one step, solves for what to keep and what to replay, installs the plan, runs it once guarded with an
    independent meter, and repairs the model of memory until the measured peak is within the budget.  The model's state
    is afterwards what it was, bit for bit, except for the installed plan.

    Args:
        model, batch, loss, optimizer, accumulation_steps, autocast, clip_norm: as for `measure`.
        budget: bytes, or text such as ``8GiB``, ``75%`` (of the device's memory) or ``auto`` (what the device has
            free now, what the model holds included); None sets no limit.
        grad_checkpoint: "auto" drops as little as the budget needs; "full" drops everything that can be replayed;
            "off" installs nothing.
        reference_budget_bytes: memory that the plain step, to which the planned one is compared, may take; by default
            the budget.
        profile: what `measure` found for this very step, here or on a machine like this: it is not measured again, so
            that several processes solve the same problem. Ignored if it is of another model, batch, optimizer, device,
            number of accumulation steps or PyTorch.

    Of a model that is sharded by `fully_shard`, all its processes have to call this, and afterwards to take their steps
    together, as FSDP2 itself demands.  The budget is each process's.

    Returns:
        `Applied`, with `plan`, `profile` and `verdict`.

    Raises:
        BudgetInfeasible: not even the smallest plan (or, with "off", the plain step) fits.
        UnsupportedInput: as `measure`, or an unreadable budget.
    """
    if grad_checkpoint not in ("auto", "full", "off"):
        raise UnsupportedInput(f"grad_checkpoint={grad_checkpoint!r} is not a choice. Give 'auto', 'full' or 'off'.")
    check_model(model)
    spec = as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    begin = time.perf_counter()
    applied = find_plan(model, batch, spec, budget, grad_checkpoint, profile=profile)
    try:
        _adapt(model, batch, applied, spec, grad_checkpoint, (time.perf_counter() - begin) * 1e3)
        applied.verdict = verify_applied(model, batch, applied, spec, reference_budget_bytes=reference_budget_bytes)
    except BaseException:
        applied.remove()
        raise
    return applied


def _adapt(
    model: torch.nn.Module,
    batch: Any,
    applied: Applied,
    spec: Step,
    grad_checkpoint: GradCheckpoint,
    planning_ms: float,
) -> None:
    """Have batches of other shapes planned, too, for the same budget."""
    budget_bytes = applied.plan.budget_bytes

    def plan_guarded(other: Any, other_spec: Step) -> Applied:
        return find_plan(model, other, other_spec, budget_bytes, grad_checkpoint, within_budget=True)

    shapes = PlanCache(model, applied, spec, budget_bytes, grad_checkpoint, plan_guarded, planning_ms)
    shapes.add(batch, applied)
    applied.adapt(shapes)


def find_plan(
    model: torch.nn.Module,
    batch: Any,
    spec: Step,
    budget: int | str | None = None,
    grad_checkpoint: GradCheckpoint = "auto",
    *,
    within_budget: bool = False,
    profile: Profile | None = None,
) -> Applied:
    """`fit` without the proof: a plan whose guarded run kept the budget, installed on the model.

    Args:
        within_budget: never run a step that is predicted to need more than the budget, not even to learn which budget
            would be enough.
        profile: as for `fit`.

    Raises:
        BudgetInfeasible, UnsupportedInput: as `fit`.
    """
    device = device_of(model)
    budget_bytes = meter.device_memory_bytes(device) if budget is None else resolve_budget(budget, device)
    group = group_of(model)  # its processes take each step, and so each decision about one, together
    is_known = all(group.gather(profile is not None and _is_of(profile, model, batch, spec)))
    if profile is None or not is_known:
        profile = measure_together(model, batch, spec, budget_bytes=budget_bytes)
    for _ in range(_MOST_ROUNDS):
        found, infeasible = _choose_together(profile, budget_bytes, grad_checkpoint, group)
        if infeasible is not None:
            # The budget that the error names shall be one that runs: try it, if the device has that much.
            if within_budget or not all(group.gather(infeasible.required_bytes <= resolve_budget("auto", device))):
                raise infeasible
            found = _choose(profile, infeasible.required_bytes, grad_checkpoint)
        assert found is not None  # either there is a plan, or it is said why not
        plan = found
        applied = apply(model, plan, spec=spec, profile=profile)
        try:
            repaired = _guard(model, batch, applied, spec, profile)
        except BaseException:
            applied.remove()
            raise
        if repaired is None and infeasible is None:
            return applied
        applied.remove()
        if repaired is None:
            break
        profile = repaired
    raise infeasible or BudgetInfeasible(
        plan.predicted_peak_bytes + profile.correction_bytes, budget_bytes, plan.peak_where
    )


def _choose_together(
    profile: Profile, budget_bytes: int, grad_checkpoint: GradCheckpoint, group: Group
) -> tuple[Plan | None, BudgetInfeasible | None]:
    """The plan; else, where one of the processes has none, what the neediest of them needs."""
    plan: Plan | None = None
    problem: BudgetInfeasible | None = None
    try:
        plan = _choose(profile, budget_bytes, grad_checkpoint)
    except BudgetInfeasible as infeasible:
        problem = infeasible
    problems = [one for one in group.gather(problem) if one is not None]
    if problems:
        return None, max(problems, key=lambda one: one.required_bytes)
    return plan, None


def _is_of(profile: Profile, model: torch.nn.Module, batch: Any, spec: Step) -> bool:
    """The profile is of this step, as far as it says."""
    return (
        profile.fingerprint == fingerprint(model)
        and profile.batch == describe_batch(batch)
        and profile.optimizer == ", ".join(type(optimizer).__name__ for optimizer in spec.optimizers)
        and profile.accumulation_steps == spec.accumulation_steps
        and torch.device(profile.device).type == device_of(model).type
        and profile.torch_version == torch.__version__
    )


def _choose(profile: Profile, budget_bytes: int, grad_checkpoint: GradCheckpoint) -> Plan:
    if grad_checkpoint == "auto":
        return solve(profile, budget_bytes)
    plan = (full_plan if grad_checkpoint == "full" else plain_plan)(profile, budget_bytes)
    if plan.predicted_peak_bytes > budget_bytes:
        raise BudgetInfeasible(plan.predicted_peak_bytes, budget_bytes, plan.peak_where, plan.breakdown)
    return plan


def _guard(model: torch.nn.Module, batch: Any, applied: Applied, spec: Step, profile: Profile) -> Profile | None:
    """Run the plan once, metered. None if it held; else a profile that knows better."""
    plan = applied.plan
    trial = Trial(model, batch, applied, spec)
    try:
        outcome = trial.guarded()
        measured_bytes, mismatches = outcome.peak_bytes, outcome.mismatches
        applied.guarded_peak_bytes = measured_bytes
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            measured_bytes, mismatches = plan.budget_bytes + max(plan.budget_bytes // 20, 1 << 20), 0
        elif applied.refused:  # replay would have been wrong, and calibration said where
            measured_bytes, mismatches = 0, applied.statistics.mismatches + applied.statistics.unplanned_calls
        else:
            raise
    finally:
        trial.restore()
    if mismatches and profile.is_sharded:  # such a model cannot be measured by running it; its tapes keep it right
        _log.warning("%d region calls ran other operations than measured: more may be held than planned", mismatches)
    elif mismatches and profile.method == "fake":  # first: positions that were refused are not this profile's either
        _log.info("%d region calls ran other operations than measured; measuring with a real step", mismatches)
        applied.remove()
        return measure_step(model, batch, spec, concrete=True, budget_bytes=plan.budget_bytes)
    # What one process found, all heed: they have to come to the same decision.
    refused: dict[str, set[int]] = {}
    for positions in trial.group.gather(applied.refused):
        for key, found in positions.items():
            refused.setdefault(key, set()).update(found)
    if refused:
        _log.info("calibration refused operations in %d regions; solving again", len(refused))
        return _without(profile, refused)
    over_bytes = max(trial.group.gather(measured_bytes - plan.budget_bytes))
    if over_bytes <= 0:
        return None
    excess_bytes = max(trial.group.gather(measured_bytes - plan.predicted_peak_bytes))
    _log.info("the guarded run took %s more than predicted; solving again", format_bytes(excess_bytes))
    return replace(profile, correction_bytes=profile.correction_bytes + max(excess_bytes, over_bytes))


def _without(profile: Profile, refused: Mapping[str, AbstractSet[int]]) -> Profile:
    """The profile with the refused operations marked as not replayable."""
    ops = list(profile.ops)
    for region in profile.regions:
        for position in refused.get(region.key, ()):
            if position >= region.op_count:  # this call ran more operations than the measured one
                continue
            index = region.first_op + position
            ops[index] = replace(ops[index], keep_reason="calibration: a second run gave other bits or changed inputs")
    return replace(profile, ops=tuple(ops))
