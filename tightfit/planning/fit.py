"""`fit`: measure, solve, apply, verify, with repair until the measured peak keeps the budget."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.fsdp import process_group_of
from tightfit.distributed.process_group import ProcessGroup, communication_failed, is_communication_failure
from tightfit.errors import BudgetInfeasible, ProofWarning, UnsupportedInput, VerificationFailed
from tightfit.installation.applied import Applied
from tightfit.interrupts import waiting_interrupts
from tightfit.planning.plan_cache import PlanCache
from tightfit.planning.replan import Replanner
from tightfit.planning.search import FoundPlan, ran_out_of_memory, search
from tightfit.records import Profile, Verdict
from tightfit.records.decision import GradCheckpoint
from tightfit.simulation.reserved import saved_by_growing_segments
from tightfit.solver.solver import solver_of
from tightfit.step.exclude import Exclude, excluded_paths
from tightfit.step.key import ModelWatch, step_key
from tightfit.step.model import check_model, device_of
from tightfit.step.step import LossFunction, Optimizers, Step, as_step
from tightfit.units import format_bytes
from tightfit.verification.trial import Trial
from tightfit.verification.verify import prove

_log = logging.getLogger(__name__)

#: Share of the reserved bytes.
_WORTH_SAYING = 0.02


@waiting_interrupts()
def fit(
    model: torch.nn.Module,
    batch: Any,
    *,
    budget: int | str | Budget | None = None,
    step: Step | None = None,
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
        model: any module with parameters that train, all on one device.
        batch: one batch as training will give it, the largest if they differ. Without `loss`, a mapping becomes keyword
            arguments, a tuple positional arguments, anything else one argument.
        budget: the most device memory that a step may hold: bytes, or text such as ``8GiB``, ``75%`` (of the device's
            memory) or ``auto`` (what the device has free now, what the model holds included), or a `Budget`, which may
            reserve a part beside the step; None sets no limit.
        step: how a step runs, in one object; or give the keywords from `loss` to `clip_norm`.
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
            number of accumulation steps, `exclude` or PyTorch.
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
    check_model(model)
    step = as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    step = replace(step, excluded=excluded_paths(model, exclude))
    device = device_of(model)
    budget = Budget.of(device_for(device).capacity_bytes() if budget is None else budget, device)
    begin = time.perf_counter()
    watch = ModelWatch(model)
    key = step_key(watch, batch, step.optimizers)  # before anything runs, which may change what is compared
    group = process_group_of(model)
    with ExitStack() as cap, _failures_explained(budget, group), Trial(model, batch, step) as trial:
        if memory_cap and group.is_single_process:
            cap.callback(device_for(device).cap_held(budget.total_bytes))
        with budget.in_totals():
            applied, found = search(trial, budget.step_bytes, grad_checkpoint, profile=profile)
        try:
            planning_ms = (time.perf_counter() - begin) * 1e3
            replanner = Replanner(model, applied, step, budget, grad_checkpoint)
            cache = PlanCache(replanner, watch, step.optimizers, planning_ms)
            cache.add(key, found)
            applied.follow(cache)
            _recommend_growing_segments(found)
            try:
                verdict = prove(trial, applied, found.outcome, reference_budget_bytes=reference_budget_bytes)
            except (RuntimeError, MemoryError) as error:
                if trial.group.is_single_process or not is_out_of_memory(error):
                    raise
                with budget.in_totals():
                    raise ran_out_of_memory(found.plan, error) from error
            applied.verdict = verdict
            if verdict.ok is False and on_failure == "raise":
                raise VerificationFailed(verdict.reason, verdict)
            if not verdict.ok and trial.group.is_main_process:
                _warn(verdict)
            if memory_cap and not group.is_single_process:  # not before: nobody can leave a trial step that runs out
                cap.callback(device_for(device).cap_held(budget.total_bytes))
        except BaseException:
            applied.remove()
            raise
        applied.when_removed(cap.pop_all().close)
    applied.keep_promises(budget.beside_step_bytes)
    return applied


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


def _recommend_growing_segments(found: FoundPlan) -> None:
    """Say what PyTorch's allocator would save if its segments could grow, where that is worth a line."""
    plan = found.plan
    saved_bytes = saved_by_growing_segments(solver_of(found.profile).index, plan.decisions, plan.shared_tapes)
    if saved_bytes > _WORTH_SAYING * plan.predicted_reserved_bytes:
        _log.info(
            "with PYTORCH_ALLOC_CONF=expandable_segments:True the allocator would reserve %s less for this plan",
            format_bytes(saved_bytes),
        )


def _warn(verdict: Verdict) -> None:
    if verdict.ok is None:
        what = "the planned step was not wholly compared with the plain one"
        rest = "Give reference_budget_bytes= to let the plain step take more memory; the verdict names the rest."
    else:
        what = "the planned step is not the plain step within its budget"
        rest = "The plan is installed all the same, as on_failure='warn' asks: expect another training."
    warnings.warn(f"{what}: {verdict.reason}. {rest}", ProofWarning, stacklevel=4)  # who called `fit`
