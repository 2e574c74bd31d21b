"""Find a plan that keeps the budget: measure, solve, try it in a real step, and repair what was predicted wrongly."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.distributed.process_group import ProcessGroup
from tightfit.errors import BudgetInfeasible
from tightfit.installation.applied import Applied
from tightfit.installation.install import install
from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.interrupts import waiting_interrupts
from tightfit.planning.trial_repair import try_plan
from tightfit.profiling.measure import measure_together
from tightfit.progress import progress
from tightfit.records import Plan, Profile
from tightfit.records.decision import GradCheckpoint
from tightfit.simulation.allocator_settings import AllocatorSettings
from tightfit.solver.solver import Solver, solver_of
from tightfit.step.batch import describe_batch
from tightfit.step.fingerprint import fingerprint
from tightfit.step.step import Step
from tightfit.verification.trial import Outcome, Trial

#: A trial run and a new solve for each; the first one usually holds.
_MOST_ROUNDS = 6
#: Segments of the allocator that a sharded model's steps are planned to leave, beside a copy of the largest collective,
#: where the card has no more than the budget: nobody can leave such a step that runs out of memory. With gloo, steps
#: were seen to take as much more than predicted as three and that copy.
_UNTRIED_SEGMENTS = 4
#: The memory model's own bar for its largest error: within it, the smallest plan's measured peak decides.
_NEAR = 0.02


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
    profile: Profile | None = None,
) -> FoundPlan:
    """Find a plan as `search` does, and leave the model as it was, without a plan."""
    with Trial(model, batch, step) as trial:
        applied, found = search(trial, budget_bytes, grad_checkpoint, within_budget=within_budget, profile=profile)
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
    elif profile.allocator is not None:  # it was measured in another process, or before other things were there
        now = device_for(trial.device).allocator_state(
            trial.bytes_held(),
            {signature.name for signature in profile.signatures},
        )
        profile = replace(profile, allocator=now)
    try:
        return _Search(trial, profile, budget_bytes, grad_checkpoint, within_budget).run()
    except BudgetInfeasible as error:
        if all(profile.checkpoints.values()) or grad_checkpoint == "off":
            raise
        trial.restore()
        as_it_is = measure_together(trial.model, trial.batch, trial.step, budget_bytes=budget_bytes, as_it_is=True)
        try:
            return _Search(trial, as_it_is, budget_bytes, grad_checkpoint, within_budget).run()
        except BudgetInfeasible as other:
            raise min(error, other, key=lambda one: one.required_bytes) from None


def confirm_smallest(trial: Trial, profile: Profile) -> Profile:
    """Run the plan for the smallest budget once, and return a profile whose smallest budget is one that runs.

    Where there is no room for it, or it cannot be repaired, the profile goes on naming what is unproven.
    """
    for _ in range(_MOST_ROUNDS):
        plan = solver_of(profile).smallest_plan()
        if not _has_room(trial, plan.predicted_peak_bytes):
            break
        known = profile
        applied = _installed(trial, plan, profile)
        try:
            _, profile = try_plan(trial, applied, profile)
        finally:
            applied.remove()
        if profile.ops is known.ops:  # it held, or what it took beyond the prediction has been added
            return replace(profile, unproven=())
    return profile


def _installed(trial: Trial, plan: Plan, profile: Profile) -> Applied:
    if fingerprint(trial.model) != plan.fingerprint:
        trial.go_to_start()  # an earlier run has given buffers other shapes, as quantisation's observers do
    return install(trial.model, plan, step=trial.step, profile=profile)


class _Search:
    """Choose, try and repair until a plan holds, or it is known what the smallest one needs.

    Near its limit a budget is judged by the smallest plan alone, run under the meter: that plan follows from sizes, not
    from measured times, so that every search judges alike, and the budget that one names is accepted by all others.
    """

    def __init__(
        self, trial: Trial, profile: Profile, budget_bytes: int, grad_checkpoint: GradCheckpoint, within_budget: bool
    ) -> None:
        self._trial = trial
        self._group = trial.group
        self._budget_bytes = budget_bytes
        self._grad_checkpoint: GradCheckpoint = grad_checkpoint
        self._within_budget = within_budget
        self._profile = profile = self._with_margin(profile)
        self._given_correction_bytes = profile.correction_bytes
        self._measured_for_bytes = budget_bytes
        self._smallest_runs = False
        """The smallest plan of this profile was run, and keeps the budget."""

    def _with_margin(self, profile: Profile) -> Profile:
        """Return the profile with what a step may take beyond the prediction, where it must not be found out."""
        if self._group.is_single_process or not device_for(self._trial.device).caches_memory:
            return profile
        # Whatever the budget: of two that are refused, both name the same one.
        settings = AllocatorSettings.parse(profile.allocator.settings if profile.allocator is not None else "")
        collective_bytes = max((storage.nbytes for storage in profile.storages if storage.stream), default=0)
        margin_bytes = collective_bytes + _UNTRIED_SEGMENTS * settings.large_segment_bytes
        margin_bytes = max(self._group.all_gather(margin_bytes))
        if all(self._group.all_gather(_has_room(self._trial, self._budget_bytes + margin_bytes))):
            return profile
        return replace(profile, margin_bytes=profile.margin_bytes + margin_bytes)

    def run(self) -> tuple[Applied, FoundPlan]:
        """Return the plan that held, installed."""
        for _ in range(_MOST_ROUNDS):
            smallest = None
            if not self._smallest_runs and self._is_near_the_limit():
                smallest = self._try_smallest()
                if smallest is None:
                    continue
            solver = solver_of(self._profile)
            progress("solving")
            chosen = _choose_together(solver, self._budget_bytes, self._grad_checkpoint, self._group)
            if chosen is None:
                smallest = smallest or self._try_smallest()
                if smallest is None:
                    continue
                return smallest
            if smallest is not None:
                if all(self._group.all_gather(_decisions(chosen) == _decisions(smallest[1].plan))):
                    return smallest
                smallest[0].remove()
                self._smallest_runs = True
            found = self._try(chosen, self._profile)
            if found is not None:
                return found
        for _ in range(_MOST_ROUNDS):
            smallest = self._try_smallest()
            if smallest is not None:
                return smallest
        raise self._infeasible(self._smallest_plan(), self._budget_bytes + 1)

    def _try(self, plan: Plan, profile: Profile) -> tuple[Applied, FoundPlan] | None:
        """Run a plan, and leave it installed if it keeps its budget; else learn from it."""
        progress("trying the plan")
        applied = _installed(self._trial, plan, profile)
        try:
            outcome, repaired = try_plan(self._trial, applied, profile)
        except BaseException:
            applied.remove()
            raise
        if outcome is not None:
            return applied, FoundPlan(plan=plan, profile=profile, resolved=applied.resolved, outcome=outcome)
        applied.remove()
        if repaired.ops is not profile.ops:
            self._smallest_runs = False
        self._profile = repaired
        return None

    def _is_near_the_limit(self) -> bool:
        # A sharded step's measured peak is not the same each time its plan is installed: two runs do not judge alike.
        near = self._grad_checkpoint == "auto" and not self._profile.is_sharded
        if near:
            solver = solver_of(self._uncorrected())
            plain = solver.plain(0)
            # The smallest plan at one level is found sooner, and the smallest of all needs no more.
            near = (
                plain.predicted_peak_bytes > self._budget_bytes
                and solver.smallest_at_one_level().peak_bytes * (1 + _NEAR) > self._budget_bytes
                and self._smallest_plan().predicted_peak_bytes * (1 + _NEAR) > self._budget_bytes
            )
        return any(self._group.all_gather(near))

    def _uncorrected(self) -> Profile:
        """Return the profile without what was added because of other plans than the smallest."""
        if self._profile.correction_bytes <= self._given_correction_bytes:
            return self._profile
        return replace(self._profile, correction_bytes=self._given_correction_bytes)

    def _smallest_plan(self) -> Plan:
        solver = solver_of(self._uncorrected())
        if self._grad_checkpoint == "auto":
            return solver.smallest_plan()
        plan = solver.full(0) if self._grad_checkpoint == "full" else solver.plain(0)
        return replace(plan, budget_bytes=plan.predicted_peak_bytes)

    def _try_smallest(self) -> tuple[Applied, FoundPlan] | None:
        """Run the smallest plan, and leave it installed if it keeps the budget; None where the profile has changed.

        Raises:
            BudgetInfeasible: it does not. The error names what it needs.
        """
        plan = self._smallest_plan()
        needed_bytes = required_bytes = max(self._group.all_gather(plan.predicted_peak_bytes))
        fits = required_bytes <= self._budget_bytes
        # Beyond the budget it is run only to learn which budget would be enough, if the device has that much memory.
        if not fits and (
            self._within_budget or not all(self._group.all_gather(_has_room(self._trial, required_bytes)))
        ):
            raise self._infeasible(plan, required_bytes)
        is_estimated = any(self._group.all_gather(_is_estimated(self._profile)))
        before = self._uncorrected()
        found = self._try(replace(plan, budget_bytes=max(self._budget_bytes, required_bytes)), before)
        if found is not None and fits:
            return found
        if found is not None:
            found[0].remove()
            if is_estimated:  # too much, perhaps: what was measured counts
                needed_bytes = max(self._group.all_gather(found[1].outcome.peak_bytes))
        elif self._profile.ops is not before.ops:
            return None
        else:
            needed_bytes += self._profile.correction_bytes - before.correction_bytes
        if needed_bytes <= self._budget_bytes:
            self._given_correction_bytes = before.correction_bytes + needed_bytes - required_bytes
            self._profile = self._uncorrected()
            return None
        if is_estimated and self._measured_for_bytes < needed_bytes:
            # What could not be run alone within the budget can be within the one that would be named.
            self._measured_for_bytes = needed_bytes
            trial = self._trial
            trial.restore()
            self._profile = measure_together(trial.model, trial.batch, trial.step, budget_bytes=needed_bytes)
            return None
        return self._try_plain_instead(plan, needed_bytes, before)

    def _try_plain_instead(self, smallest: Plan, needed_bytes: int, profile: Profile) -> tuple[Applied, FoundPlan]:
        """Run the plain step where the smallest plan needs more than it, for no budget above plain's may be named."""
        plain = solver_of(profile).plain(self._budget_bytes)
        plain_bytes = max(self._group.all_gather(plain.predicted_peak_bytes))
        if plain_bytes >= needed_bytes or _decisions(plain) == _decisions(smallest):
            raise self._infeasible(smallest, needed_bytes)
        found = self._try(replace(plain, budget_bytes=max(self._budget_bytes, plain_bytes)), profile)
        if found is not None and plain_bytes <= self._budget_bytes:
            return found
        if found is not None:
            found[0].remove()
        else:
            plain_bytes += max(0, self._profile.correction_bytes - profile.correction_bytes)
        if plain_bytes >= needed_bytes:
            raise self._infeasible(smallest, needed_bytes)
        raise self._infeasible(plain, plain_bytes)

    def _infeasible(self, plan: Plan, required_bytes: int) -> BudgetInfeasible:
        added_bytes = required_bytes - sum(plan.breakdown.values())
        breakdown = {**plan.breakdown, "correction": plan.breakdown["correction"] + added_bytes}
        switched_off = self._profile.switched_off
        return BudgetInfeasible(
            required_bytes, self._budget_bytes, plan.peak_where, breakdown, switched_off=switched_off
        )


def _decisions(plan: Plan) -> tuple[object, ...]:
    return plan.regions, plan.recipes, plan.shared_tapes


def _is_estimated(profile: Profile) -> bool:
    return any(signature.note for signature in profile.signatures)


def _has_room(trial: Trial, required_bytes: int) -> bool:
    device = device_for(trial.device)
    most = device.most_held_bytes()
    return required_bytes <= Budget.of("auto", trial.device).total_bytes and (most is None or required_bytes <= most)


def _is_of(profile: Profile, trial: Trial) -> bool:
    """Tell whether the profile is of this step, as far as it says."""
    return (
        profile.fingerprint == fingerprint(trial.model)
        and profile.batch == describe_batch(trial.batch)
        and profile.optimizer == ", ".join(type(optimizer).__name__ for optimizer in trial.step.all_optimizers)
        and profile.excluded == trial.step.excluded
        and profile.accumulation_steps == trial.step.accumulation_steps
        and device_for(profile.device).kind == device_for(trial.device).kind
        and profile.torch_version == torch.__version__
    )


def _choose_together(
    solver: Solver, budget_bytes: int, grad_checkpoint: GradCheckpoint, group: ProcessGroup
) -> Plan | None:
    """Return the plan; None where one of the processes has none."""
    plan: Plan | None = None
    with suppress(BudgetInfeasible):
        plan = _choose(solver, budget_bytes, grad_checkpoint)
    return plan if all(group.all_gather(plan is not None)) else None


def _choose(solver: Solver, budget_bytes: int, grad_checkpoint: GradCheckpoint) -> Plan:
    if grad_checkpoint == "auto":
        return solver.solve(budget_bytes)
    plan = (solver.full if grad_checkpoint == "full" else solver.plain)(budget_bytes)
    if plan.predicted_peak_bytes > budget_bytes:
        raise BudgetInfeasible(plan.predicted_peak_bytes, budget_bytes, plan.peak_where, plan.breakdown)
    return plan
