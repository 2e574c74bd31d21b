"""`fit`: measure, solve, apply, verify, with repair until the measured peak keeps the budget."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from tightfit.collector import heap_aside
from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.fsdp import process_group_of, reducing_each_backward
from tightfit.distributed.process_group import ProcessGroup, communication_failed, is_communication_failure
from tightfit.errors import BudgetInfeasible, ProofWarning, UnsupportedInput, VerificationFailed
from tightfit.installation.applied import Applied
from tightfit.installation.kinds import KindOfStep
from tightfit.installation.promises import users_line
from tightfit.interrupts import waiting_interrupts
from tightfit.planning.plan_cache import PlanCache
from tightfit.planning.replan import Replanner
from tightfit.planning.search import FoundPlan, search
from tightfit.planning.trial_repair import ran_out_of_memory
from tightfit.profiling.measure import measure_together
from tightfit.progress import showing_when_long
from tightfit.records import Profile, Verdict
from tightfit.records.decision import GradCheckpoint
from tightfit.records.verdict import listed
from tightfit.simulation.reserved import saved_by_growing_segments
from tightfit.solver.solver import solver_of
from tightfit.step.exclude import Exclude, excluded_paths
from tightfit.step.key import ModelWatch, step_key
from tightfit.step.model import check_model, device_of
from tightfit.step.models import Models, as_model
from tightfit.step.open_autocast import as_it_runs_now, without_open_autocast
from tightfit.step.step import LossFunction, Optimizers, Step, as_steps
from tightfit.units import format_bytes
from tightfit.verification.trial import Trial
from tightfit.verification.verify import prove

_log = logging.getLogger(__name__)

#: Share of the reserved bytes.
_WORTH_SAYING = 0.02


@showing_when_long()
@waiting_interrupts()
@heap_aside()
def fit(
    model: Models,
    batch: Any,
    *,
    budget: int | str | Budget | None = None,
    step: Step | Mapping[str, Step] | None = None,
    loss: LossFunction | None = None,
    optimizer: Optimizers = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    exclude: Exclude = (),
    grad_checkpoint: GradCheckpoint = "auto",
    reference_budget_bytes: int | None = None,
    profile: Profile | None = None,
    memory_cap: bool = False,
    on_failure: Literal["raise", "warn"] = "raise",
) -> Applied:
    """Make training steps of `model` on batches like `batch` fit `budget`, and prove it.

    Measures one step, solves for what to keep and what to recompute, installs the plan, runs it once under an
    independent meter, and repairs the prediction until the measured peak is within the budget.  Then the planned step
    is compared with the plain one, bit by bit.  The model's state is afterwards what it was, bit for bit, except for
    the installed plan.  Batches of other shapes are planned before they run, for the same budget.

        applied = tightfit.fit(model, batch, budget="8GiB", loss=loss_fn, optimizer=optimizer)
        for batch in batches:
            applied.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: any module with parameters that train, all on one device. Of several models a list, a tuple or a mapping,
            which `loss` is called with: all that they hold is in the budget.
        batch: one batch as training will give it, the largest if they differ. Without `loss`, a mapping becomes keyword
            arguments, a tuple positional arguments, anything else one argument. For several kinds of steps with
            batches of their own, a mapping with the same names.
        budget: the most device memory that a step may hold: bytes, or text such as ``8GiB``, ``75%`` (of the device's
            memory) or ``auto`` (what the device has free now, what the model holds included), or a `Budget`, which may
            reserve a part beside the step; None sets no limit.
        step: how a step runs, in one object; or give the keywords from `loss` to `clip_norm`. Of several kinds of steps
            that take turns, such as critic and generator, a mapping of names to steps: each is planned and proven, with
            what the others hold in the budget. Training says which one runs: ``applied.step(batch, kind="critic")``.
        loss: called with (model, batch), returns a scalar tensor. None: the model's result, or its ``loss``, is one.
        optimizer: one, several, or None (then its state and step are in no figure).
        accumulation_steps: forward and backward passes for each optimizer step.
        autocast: dtype for torch.autocast around forward.
        clip_norm: total gradient norm to clip to before the optimizer step.
        exclude: modules that are left untouched, or patterns of their paths such as ``layers.*.attn``: nothing inside
            them is recomputed, and no forward of theirs is replaced.
        grad_checkpoint: "auto" drops as little as the budget needs; "full" drops everything that can be recomputed;
            "off" installs nothing.
        reference_budget_bytes: memory that the plain step, to which the planned one is compared, may take; by default
            the budget.
        profile: what `measure` found for this very step, here or on a machine like this: it is not measured again, so
            that several processes solve the same problem. Ignored if it is of another model, batch, optimizer, device,
            number of accumulation steps, `exclude` or PyTorch. Of one kind of step only.
        memory_cap: let PyTorch reserve no more than the budget in this process, less what it holds outside PyTorch, so
            that the budget is kept in every step, whatever it does: at the cap the allocator gives its cache back and
            goes on, which waits for the device (`Plan.flushes_per_step`), or the step runs out of memory. A lower cap
            that was set before stays. `remove()` puts the old one back. On CUDA only.
        on_failure: what to do where the planned step is not the plain one: "raise", or "warn" (a `ProofWarning`) and
            leave the plan installed.

    Of a model that is sharded by `fully_shard`, all its processes have to call this, and afterwards to take their steps
    together, as FSDP2 itself demands.  The budget is each process's.

    Returns:
        `Applied`, with `plan`, `profile` and `verdict`. Where the verdict's `ok` is None, a `ProofWarning` says why.

    Raises:
        BudgetInfeasible: not even the smallest plan (or, with "off", the plain step) fits, or the device runs out of
            memory. It names the smallest budget that works, and what sets it.
        RanOutOfMemory: of a sharded model, a trial step did on this rank. The other ranks cannot go on; end them all.
        VerificationFailed: the planned step gave another loss, gradient, buffer or random state than the plain one, or
            its peak is over the budget. No plan is installed, and the model is as it was, bit for bit.
        UnsupportedInput: as `measure`; an unreadable budget; or both `step` and single keywords.
    """
    if on_failure not in ("raise", "warn"):
        raise UnsupportedInput(f"on_failure={on_failure!r} is not a choice. Give 'raise' or 'warn'.")
    if grad_checkpoint not in ("auto", "full", "off"):
        raise UnsupportedInput(f"grad_checkpoint={grad_checkpoint!r} is not a choice. Give 'auto', 'full' or 'off'.")
    steps = as_steps(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    if profile is not None and len(steps) > 1:
        raise UnsupportedInput(
            "profile= was given with several kinds of steps, and it is of one step. Leave it out: each is measured."
        )
    one = as_model(model)
    check_model(one)
    known = next(iter(steps.values())).starting(one).gradients  # of all kinds: what one makes, the others find
    excluded = excluded_paths(one, exclude)
    steps = {name: replace(each, excluded=excluded, gradients=known) for name, each in steps.items()}
    device = device_of(one)
    budget = Budget.of(device_for(device).capacity_bytes() if budget is None else budget, device)
    fitting = _Fit(one, _batches(batch, steps), steps, budget, grad_checkpoint, reference_budget_bytes, on_failure)
    with without_open_autocast(one), reducing_each_backward(one):
        return fitting.run(profile, memory_cap=memory_cap)


class _Fit:
    """Plan and prove each kind of step of a model within one budget."""

    def __init__(
        self,
        model: torch.nn.Module,
        batches: Mapping[str, Any],
        steps: Mapping[str, Step],
        budget: Budget,
        grad_checkpoint: GradCheckpoint,
        reference_budget_bytes: int | None,
        on_failure: Literal["raise", "warn"],
    ) -> None:
        self._model = model
        self._batches = batches
        self._given = steps
        self._steps = {name: as_it_runs_now(step, model) for name, step in steps.items()}
        self._budget = budget
        self._grad_checkpoint: GradCheckpoint = grad_checkpoint
        self._reference_budget_bytes = reference_budget_bytes
        self._on_failure = on_failure
        self._found: dict[str, FoundPlan] = {}
        self._others: dict[str, KindOfStep] = {}
        self._infeasible: list[BudgetInfeasible] = []
        """Of kinds that need more than the budget: all are planned, as the budget that is named has to do for all."""
        self._steps_run = 0
        self._begin = time.perf_counter()
        self._watch = ModelWatch(model)
        self._optimizers = next(iter(steps.values())).all_optimizers
        # Before anything runs, which may change what is compared.
        self._keys = {
            name: step_key(self._watch, batches[name], self._optimizers, name, step.autocast)
            for name, step in steps.items()
        }

    def run(self, profile: Profile | None, *, memory_cap: bool) -> Applied:
        """Return the plan of the first kind, installed, which knows those of the others."""
        model, budget = self._model, self._budget
        device, group = device_for(device_of(model)), process_group_of(model)
        first = next(iter(self._steps))
        with ExitStack() as cap, _failures_explained(budget, group):
            if memory_cap and group.is_single_process:
                cap.callback(device.cap_held(budget.total_bytes))
            profiles = self._measured() if len(self._steps) > 1 else {first: profile}
            self._plan_others(profiles)
            with Trial(model, self._batches[first], self._steps[first]) as trial:
                applied, found = self._search_first(trial, profiles[first])
                try:
                    self._follow(applied, found)
                    applied.verdict = self._proven(trial, applied, found)
                    self._steps_run += trial.steps_run
                    applied.steps_run = self._steps_run
                    _log.info("the step was run %d times to try the plan and to prove it", self._steps_run)
                    if first:
                        applied.kinds = {first: _kind(found, applied.verdict)} | self._others
                        applied.verdict = Verdict.of_kinds({name: one.verdict for name, one in applied.kinds.items()})
                    if memory_cap and not group.is_single_process:
                        # Not before: nobody can leave a trial step that runs out.
                        cap.callback(device.cap_held(budget.total_bytes))
                except BaseException:
                    applied.remove()
                    raise
            applied.when_removed(cap.pop_all().close)
        applied.keep_promises(budget.beside_step_bytes)
        return applied

    def _measured(self) -> dict[str, Profile]:
        """Measure all kinds of steps: once more where another's backward made gradients that were not known of."""
        profiles: dict[str, Profile] = {}
        known_of: dict[str, int] = {}
        gradients = next(iter(self._steps.values())).gradients
        while stale := [name for name in self._steps if known_of.get(name) != gradients.count]:
            for name in stale:
                batch, step = self._batches[name], self._steps[name]
                profiles[name] = measure_together(self._model, batch, step, budget_bytes=self._budget.step_bytes)
                known_of[name] = gradients.count
        return profiles

    def _plan_others(self, profiles: Mapping[str, Profile | None]) -> None:
        """Plan and prove all kinds of steps but the first; the model is afterwards without a plan."""
        for name in list(self._steps)[1:]:
            with Trial(self._model, self._batches[name], self._steps[name]) as trial:
                try:
                    applied, found = self._search(trial, profiles[name])
                except BudgetInfeasible as error:
                    self._infeasible.append(error)
                    continue
                try:
                    if not self._infeasible:
                        self._found[name] = found
                        self._others[name] = _kind(found, self._proven(trial, applied, found))
                finally:
                    applied.remove()
                    self._steps_run += trial.steps_run

    def _search(self, trial: Trial, profile: Profile | None) -> tuple[Applied, FoundPlan]:
        with self._budget.in_totals():
            return search(trial, self._budget.step_bytes, self._grad_checkpoint, profile=profile)

    def _search_first(self, trial: Trial, profile: Profile | None) -> tuple[Applied, FoundPlan]:
        """Search a plan for the first kind of step, the last that is planned, and raise what any kind needs."""
        try:
            applied, found = self._search(trial, profile)
        except BudgetInfeasible as error:
            raise max([error, *self._infeasible], key=lambda one: one.required_bytes) from None
        if self._infeasible:
            applied.remove()
            raise max(self._infeasible, key=lambda one: one.required_bytes)
        return applied, found

    def _follow(self, applied: Applied, found: FoundPlan) -> None:
        """Let an installed plan know those of all kinds, and have more made."""
        planning_ms = (time.perf_counter() - self._begin) * 1e3
        replanner = Replanner(self._model, applied, self._given, self._budget, self._grad_checkpoint)
        first = next(iter(self._steps))
        cache = PlanCache(replanner, self._watch, self._given, planning_ms)
        for name, one in (*self._found.items(), (first, found)):
            cache.add(self._keys[name], one)
            _recommend_growing_segments(one)
            _tell_of_reached(one.profile, self._steps[name], self._model)
        applied.follow(cache, self._given)

    def _proven(self, trial: Trial, applied: Applied, found: FoundPlan) -> Verdict:
        """Return the verdict on an installed plan; raise or warn where it is not what was promised."""
        try:
            verdict = prove(trial, applied, found.outcome, reference_budget_bytes=self._reference_budget_bytes)
        except (RuntimeError, MemoryError) as error:
            if trial.group.is_single_process or not is_out_of_memory(error):
                raise
            with self._budget.in_totals():
                raise ran_out_of_memory(found.plan, error) from error
        kind = f"in the step {trial.step.kind!r}, " if trial.step.kind else ""
        if verdict.ok is False and self._on_failure == "raise":
            raise VerificationFailed(kind + verdict.reason, verdict)
        if not verdict.ok and trial.group.is_main_process:
            _warn(verdict, kind)
        return verdict


def _kind(found: FoundPlan, verdict: Verdict) -> KindOfStep:
    return KindOfStep(plan=found.plan, profile=found.profile, verdict=verdict)


def _batches(batch: Any, steps: Mapping[str, Step]) -> dict[str, Any]:
    """Return the batch of each kind of step: one for all, or each its own."""
    if "" not in steps and isinstance(batch, Mapping) and batch.keys() == steps.keys():
        return dict(batch)
    return dict.fromkeys(steps, batch)


@contextmanager
def _failures_explained(budget: Budget, group: ProcessGroup) -> Iterator[None]:
    """Inside, a lack of memory that no trial run has answered becomes `BudgetInfeasible`, and a lost process
    `CommunicationFailed`.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not group.is_single_process and is_communication_failure(error):
            raise communication_failed(error) from error
        if not is_out_of_memory(error):
            raise
        required_bytes = budget.total_bytes + max(budget.total_bytes // 20, 1 << 20)  # as of a trial run that runs out
        where = "a step that was run to plan or to prove, for which the device had no more memory"
        raise BudgetInfeasible(required_bytes, budget.total_bytes, where) from error


def _tell_of_reached(profile: Profile, step: Step, model: torch.nn.Module) -> None:
    """Say what is counted that was not given."""
    if nbytes := profile.baseline.get("reached", 0):
        names = [type(thing).__name__ for thing in step.reached(model)]
        _log.info("%s that only the loss reaches are in the budget: %s", format_bytes(nbytes), listed(names))


def _recommend_growing_segments(found: FoundPlan) -> None:
    """Say what PyTorch's allocator would save if its segments could grow, where that is worth a line."""
    plan = found.plan
    saved_bytes = saved_by_growing_segments(solver_of(found.profile).index, plan.decisions, plan.shared_tapes)
    if saved_bytes > _WORTH_SAYING * plan.predicted_reserved_bytes:
        _log.info(
            "with PYTORCH_ALLOC_CONF=expandable_segments:True the allocator would reserve %s less for this plan",
            format_bytes(saved_bytes),
        )


def _warn(verdict: Verdict, kind: str) -> None:
    if verdict.ok is None:
        what = "the planned step was not wholly compared with the plain one"
        rest = "Give reference_budget_bytes= to let the plain step take more memory; the verdict names the rest."
    else:
        what = "the planned step is not the plain step within its budget"
        rest = "The plan is installed all the same, as on_failure='warn' asks: expect another training."
    file, line = users_line()
    warnings.warn_explicit(f"{what}: {kind}{verdict.reason}. {rest}", ProofWarning, file, line, registry={})
