"""Decide what to do for a step of another key than the one that `fit` planned.

* Where the model, its mode or the settings are new too (an adapter, eval mode, another dtype), a plan is made as `fit`
  makes one: measured, solved, tried in a real step, repaired.
* Where only sizes are new, the step is measured anew (`measure_reshaped`), without data if that is possible, so that
  every size and lifetime is known exactly.  If the plain step fits, nothing is dropped.  Else the decisions of plans
  for batches of similar size are tried by simulation; the fastest that fits is reused, unless that is ruled out.  A
  plan is solved for where none fits.
* No trial run confirms such a plan, so a margin is kept, and what repair had to add elsewhere is added here.  Where the
  budget leaves no room for the margin, or a region is recomputed for the first time, there is a trial run.  A model
  that FSDP2 has sharded is never run so: a trial would need all its processes.
* A batch so small that its plain step must fit several times over is not even measured, unless the device caches
  memory: what it leaves in the cache counts there, and is known of a measured step only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from tightfit._torch_private.profiler import profiler_is_running
from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.distributed.fsdp import is_sharded, reducing_each_backward
from tightfit.errors import BudgetInfeasible, first_line
from tightfit.installation.applied import Applied
from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.planning.references import Reference, References
from tightfit.planning.reuse import plans_like
from tightfit.planning.search import FoundPlan, find_plan
from tightfit.planning.shared_cache import SharedCache
from tightfit.profiling.measure import measure_step
from tightfit.profiling.remeasure import measure_reshaped
from tightfit.records import Plan, Profile
from tightfit.records.decision import GradCheckpoint
from tightfit.replay.executors import executor_of
from tightfit.replay.plan_state import as_a_whole
from tightfit.simulation.reserved import simulate_in_totals
from tightfit.solver.solver import solver_of
from tightfit.step.key import StepKey
from tightfit.step.open_autocast import as_it_runs_now, without_open_autocast
from tightfit.step.step import LossFunction, Step
from tightfit.units import format_bytes

_log = logging.getLogger(__name__)

_Way = Literal["tried", "solved", "reused", "plain", "ample"]

#: Part of the memory above what is resident that a plan leaves free if no trial run confirmed it: the memory model's
#: own bar for its largest error before repair.
UNCONFIRMED_MARGIN = 0.02
#: A batch is not measured if the plain step of one like it, grown by the cube of the ratio of sizes, fits so often.
_AMPLE = 2.0
#: Shares of what the budget leaves above the smallest plan, for which plans are solved that may share the cache.
_LESSER_SHARES = (0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True, kw_only=True)
class Replanned:
    """A plan for the steps of one key, and how it was made."""

    resolved: ResolvedPlan
    way: _Way
    """The field of `PlanStatistics` that counts it."""
    is_learnt: bool = False
    """What steps of its key do beside it cannot be planned: the batch's contents decide which operations run, or a
    wrapper that planning cannot use."""


def _loss_through(
    wrapper: torch.nn.Module, model: torch.nn.Module, loss: LossFunction | None, given: torch.nn.Module, batch: Any
) -> torch.Tensor:
    """Compute the loss with the wrapper in place of the model, if that is what is given, and not a copy of it."""
    return Step(loss=loss).run_loss(wrapper if given is model else given, batch)


class Replanner:
    """Plan steps of other keys, for one model and budget, by what was learnt from those that were tried."""

    def __init__(
        self,
        model: torch.nn.Module,
        applied: Applied,
        steps: Mapping[str, Step],
        budget: Budget,
        grad_checkpoint: GradCheckpoint,
    ) -> None:
        """Take each kind of step by its name, among others."""
        self._model = model
        self._applied = applied
        self._steps = dict(steps)
        self.budget = budget
        self._budget_bytes = budget.step_bytes
        self._grad_checkpoint: GradCheckpoint = grad_checkpoint
        self._given_losses = {name: step.loss for name, step in steps.items()}
        self._wrapper: torch.nn.Module | None = None  # through which the step calls the model
        self._is_sharded = is_sharded(model)
        self._references = References()
        self._cache = SharedCache(budget.step_bytes)

    def learn(self, key: StepKey, found: FoundPlan) -> Replanned:
        """Take a plan that a trial run confirmed as a reference for others."""
        resolved, profile = found.resolved, found.profile
        self._references.add(key, found)
        self._cache.join(solver_of(profile).index, resolved)
        return Replanned(resolved=resolved, way="tried", is_learnt=profile.data_dependent)

    def keeps_graphs(self, step: str) -> bool:
        """Tell whether a kind of step is planned with backwards that keep their graphs (``retain_graph=True``)."""
        return self._steps[step].retain_graph

    def keep_graphs(self, step: str) -> tuple[dict[int, Replanned], int]:
        """Plan a kind of step from now on for backwards that keep their graphs.

        Returns:
            New plans by the id of the `ResolvedPlan` that they replace, and the highest peak in bytes under old ones.
        """
        _log.info("a backward kept its graph, so that autograd gives nothing back in it; planning again")
        self._steps[step] = replace(self._steps[step], retain_graph=True)
        made: dict[int, Replanned] = {}
        peak_bytes = 0
        for one in self._references.of_step(step):
            profile = replace(one.profile.with_kept_graph(), correction_bytes=one.correction_bytes)
            resolved = one.resolved
            if (plan := resolved.plan) is not None:
                walked = simulate_in_totals(solver_of(profile).index, plan.decisions, plan.shared_tapes)
                peak_bytes = max(peak_bytes, walked.peak_bytes)
            with suppress(BudgetInfeasible):  # said when its next batch is planned
                planned = self._chosen(profile, *self._choose(profile, (), may_reuse=False), like=resolved)
                made[id(resolved)], resolved = planned, planned.resolved
            one.profile, one.resolved = profile, resolved
        return made, peak_bytes

    def note_call(self, resolved: ResolvedPlan, call: StepKey) -> None:
        """Note the key of the model's call in the step that a plan is for."""
        self._references.note_call(resolved, call)

    @property
    def can_measure(self) -> bool:
        """Workspace is measured with PyTorch's profiler, of which a process can run one; and not inside a forward, nor
        while all of the model is frozen (an adapter that is switched off, or trains outside of it).
        """
        if profiler_is_running() or self._applied.is_running:
            return False
        return any(parameter.requires_grad for parameter in self._model.parameters())

    @property
    def can_try(self) -> bool:
        """Whether there may be trial runs: those of a sharded model need all its processes, which may need none now."""
        return not self._is_sharded

    def is_ample_for(self, call: StepKey) -> bool:
        """Tell whether the budget is so ample that a call of the model can run plain, unmeasured."""
        return any(one.call is not None and self._is_ample(call, one.call, one) for one in self._references)

    def without_plan(self, step: str) -> ResolvedPlan:
        """Return what a step that cannot be planned follows: all that is provably replayable is dropped."""
        if self._grad_checkpoint == "off":
            return ResolvedPlan.dropping_nothing()
        return ResolvedPlan.dropping_everything(self._references.latest(step).profile)

    # ------------------------------------------------------------------------------------------------ making plans

    def plan(self, key: StepKey, batch: Any, neighbours: Iterable[Plan], *, may_reuse: bool) -> Replanned:
        """Make a plan for the steps of a key.

        Args:
            key: the step's.
            batch: one with which the step has that key.
            neighbours: plans for steps of the same kind, the ones for batches of the most similar size first.
            may_reuse: follow the decisions of a neighbour where that fits, instead of solving.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget. Nothing has changed.
        """
        reference = self._references.of_kind(key.kind)
        made: Replanned | None = None
        if reference is None:
            self._tell_of_new_kind(key.step)
        elif not device_for(self._model).caches_memory and self._is_ample(key, reference.key, reference):
            return Replanned(resolved=ResolvedPlan.dropping_nothing(), way="ample")
        elif not reference.profile.data_dependent:
            made = self._plan_by_measuring(key, batch, reference, neighbours, may_reuse)
        if made is not None:
            return made
        if self.can_try:
            return self.plan_by_trial(key, batch)
        return self._plan_untried(key, batch, neighbours, may_reuse)

    def plan_by_trial(self, key: StepKey, batch: Any, *, again: bool = False) -> Replanned:
        """Make a plan as `fit` does, with trial runs.

        Args:
            key, batch: as for `plan`.
            again: steps ran other operations than their plan's. Where the model is called through a wrapper, that may
                be the reason, and the trial calls it so, too.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget. Nothing has changed.
        """
        wrapper = self._applied.wrapper if again else None
        wrapper = wrapper if wrapper is not self._wrapper else None
        step = as_it_runs_now(self._steps[key.step], self._model)  # out here, where an autocast context may be open
        through = None if wrapper is None else self._step_through(wrapper, key.step)
        with self._applied.removed(), self._beside_training():
            profile = None if through is None else self._measured_through(through, batch)
            found = find_plan(
                self._model,
                batch,
                step if through is None or profile is None else through,
                self._budget_bytes,
                self._grad_checkpoint,
                within_budget=True,
                profile=profile,
            )
        made = self.learn(key, found)
        if wrapper is None or through is None:
            return made
        if profile is None:
            self._applied.tell_of_wrapper(wrapper)
            return replace(made, is_learnt=True)
        self._wrapper = wrapper
        self._steps[key.step] = replace(self._steps[key.step], loss=through.loss)
        return made

    def _step_through(self, wrapper: torch.nn.Module, kind: str) -> Step:
        """Return a step as it runs now, whose loss is computed through what the model is wrapped in."""
        loss = partial(_loss_through, wrapper, self._model, self._given_losses[kind])
        return replace(as_it_runs_now(self._steps[kind], self._model), loss=loss)

    def _measured_through(self, step: Step, batch: Any) -> Profile | None:
        """Measure such a step; None if the wrapper is nothing that the loss function can take for the model, or that
        can be trained by ``backward()``.
        """
        try:
            return measure_step(self._model, batch, step, concrete=True, budget_bytes=self._budget_bytes)
        except Exception as error:  # of the user's code, which is called otherwise than he does
            _log.info("a step through a wrapper failed (%s); planning without it", first_line(error))
            return None

    def _plan_untried(self, key: StepKey, batch: Any, neighbours: Iterable[Plan], may_reuse: bool) -> Replanned:
        """Make a plan from a measurement of its own, corrected by what the latest trial showed."""
        latest = self._references.latest(key.step)
        step = as_it_runs_now(self._steps[key.step], self._model)
        with self._applied.paused(), self._beside_training():
            profile = measure_step(self._model, batch, step, budget_bytes=self._budget_bytes)
        profile = replace(profile, correction_bytes=latest.correction_bytes)
        return self._chosen(profile, *self._choose(profile, neighbours, may_reuse))

    def _plan_by_measuring(
        self, key: StepKey, batch: Any, reference: Reference, neighbours: Iterable[Plan], may_reuse: bool
    ) -> Replanned | None:
        """Make a plan for another size from a measurement, with a margin; None where only a trial run can tell."""
        step = as_it_runs_now(self._steps[key.step], self._model)
        with self._applied.paused(), self._beside_training():
            profile = measure_reshaped(self._model, batch, step, reference.profile, self._budget_bytes)
        same = self._references.of_kind(key.kind, profile)
        if same is None or profile.method != same.profile.method:  # another branch, perhaps by the batch's size
            return None
        profile = self._with_margin(profile, same)
        try:
            plan, way = self._choose(profile, neighbours, may_reuse)
        except BudgetInfeasible as error:
            required_bytes = error.required_bytes - profile.margin_bytes
            if required_bytes - profile.correction_bytes > self._budget_bytes:
                raise BudgetInfeasible(
                    required_bytes,
                    self._budget_bytes,
                    error.where,
                    switched_off=error.switched_off,
                    unproven=error.unproven,
                ) from None
            return None
        if _estimated(profile) - _estimated(same.profile):  # they could not be run alone within the budget
            return None
        if _replaying(plan) - same.resolved.checked:  # a first call checks its replay, which takes memory
            return None
        _log.info("planned %s: %s, peak %s", profile.batch, way, format_bytes(plan.predicted_peak_bytes))
        return self._chosen(profile, plan, way, like=same.resolved)

    def _chosen(self, profile: Profile, plan: Plan, way: _Way, like: ResolvedPlan | None = None) -> Replanned:
        resolved = ResolvedPlan.of(plan, like)
        self._cache.join(solver_of(profile).index, resolved)
        return Replanned(resolved=resolved, way=way)

    def _choose(self, profile: Profile, neighbours: Iterable[Plan], may_reuse: bool) -> tuple[Plan, _Way]:
        """Return a plan that fits, if possible also in turn with the others, and how it was found."""
        solver = solver_of(profile)
        budget_bytes = self._budget_bytes
        plain = solver.plain(budget_bytes)
        if self._grad_checkpoint != "auto":
            plan = solver.full(budget_bytes) if self._grad_checkpoint == "full" else plain
            if plan.predicted_peak_bytes > budget_bytes:
                raise BudgetInfeasible(plan.predicted_peak_bytes, budget_bytes, plan.peak_where)
            return plan, "plain" if plan.is_plain else "solved"
        reused: list[Plan] = []

        def rivals() -> Iterator[Plan]:
            """Yield plans that fit, the fastest first; later ones are made only where these do not share the cache."""
            plain_fits = plain.predicted_peak_bytes <= budget_bytes
            if plain_fits:
                yield plain
            like = plans_like(neighbours, solver, budget_bytes)
            fitting = [plan for plan in like if plan.predicted_peak_bytes <= budget_bytes]
            if may_reuse:
                reused.extend(fitting)
            if not plain_fits and not reused:
                fitting.append(solver.solve(budget_bytes))
            yield from sorted(fitting, key=lambda plan: plan.predicted_step_ms)
            smallest_bytes = solver.smallest().peak_bytes
            for share in _LESSER_SHARES:
                lesser_bytes = smallest_bytes + int(share * (budget_bytes - smallest_bytes))
                yield replace(solver.solve(lesser_bytes), budget_bytes=budget_bytes)

        plan = self._cache.fastest(solver.index, rivals())
        is_reused = any(plan is one for one in reused)
        return plan, "plain" if plan.is_plain else "reused" if is_reused else "solved"

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """Open a context for what is run to plan: it finds no cache of other steps, and leaves none to them."""
        self._applied.cache_room.give_back()
        try:
            with without_open_autocast(self._model), reducing_each_backward(self._model):
                yield
        finally:
            self._applied.cache_room.give_back()

    def _with_margin(self, profile: Profile, reference: Reference) -> Profile:
        growth = max(1.0, _activation_bytes(profile) / max(1, _activation_bytes(reference.profile)))
        margin_bytes = int(UNCONFIRMED_MARGIN * max(0, self._budget_bytes - profile.baseline_bytes))
        return replace(
            profile,
            correction_bytes=int(reference.correction_bytes * growth),
            margin_bytes=profile.margin_bytes + margin_bytes,
        )

    def _is_ample(self, key: StepKey, known: StepKey, reference: Reference) -> bool:
        if self._grad_checkpoint == "full" or key.kind != known.kind:
            return False
        resident_bytes = reference.profile.baseline_bytes
        growth = key.growth_from(known) ** 3
        most_bytes = resident_bytes + _AMPLE * growth * (reference.plain_peak_bytes - resident_bytes)
        return most_bytes <= self._budget_bytes

    def _tell_of_new_kind(self, step: str) -> None:
        optimizers = self._steps[step].all_optimizers
        trained = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
        names = [n for n, p in self._model.named_parameters() if p.requires_grad and id(p) not in trained]
        if optimizers and names:
            _log.warning(
                "%d parameters that require a gradient (%s, ...) are in none of the optimizers that fit was given, so "
                "the memory of their optimizer is not in the budget. Add them with add_param_group, or fit again.",
                len(names),
                names[0],
            )
        _log.info("the model, its mode, or PyTorch's settings are not as when fit planned them; planning again")


def _activation_bytes(profile: Profile) -> int:
    return sum(storage.nbytes for storage in profile.storages if storage.component == "activation")


def _replaying(plan: Plan) -> set[str]:
    """Return what `ResolvedPlan.checked` has to hold of the regions that the plan replays something in."""
    return {
        region.key if executor_of(plan.recipes[region.recipe]).on_tape else as_a_whole(region.key)
        for region in plan.regions
        if region.recipe >= 0
    }


def _estimated(profile: Profile) -> set[str]:
    return {signature.name for signature in profile.signatures if signature.note}
