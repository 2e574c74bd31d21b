"""Planning a run before its first step: the largest microbatch, and batches of other sizes."""

from __future__ import annotations

import warnings
from dataclasses import replace

import tightfit
from tightfit.device.budget import Budget
from tightfit.distributed.fsdp import is_sharded
from tightfit.distributed.process_group import RankFailed
from tightfit.errors import BudgetInfeasible, ProofWarning, UnsupportedInput, VerificationFailed
from tightfit.records import Profile
from tightfit.step.microbatch import Microbatch
from tightfit.train.config import TrainConfig
from tightfit.train.data.loader import to_device
from tightfit.train.ema import MovingAverage
from tightfit.train.largest_batch import LargestMicrobatch, largest_microbatch, naming_batch
from tightfit.train.parallel.ddp import bucket_bytes
from tightfit.train.parallel.unused_parameters import UnusedParameters, find_unused_parameters
from tightfit.train.workload import Workload
from tightfit.units import format_bytes


def plan_run(
    config: TrainConfig,
    work: Workload,
    average: MovingAverage,
    first_step: int,
    total_steps: int,
    *,
    limit_bytes: int | None = None,
) -> tuple[tightfit.Applied, Budget]:
    """Plan the largest microbatch of the run and all other sizes; returns the installed plan, and the budget with what
    is reserved beside the step.  All processes call this.

    Batches of other sizes, at the ends of epochs, are planned now: whether they fit is better known before the run.
    Where `limit_bytes` is less than the budget, it is the budget.

    Raises:
        BudgetInfeasible: a batch does not fit; it is named.
        VerificationFailed: the planned step is not the plain one.
    """
    largest = largest_microbatch(work.data, work.loader, first_step, total_steps)
    microbatches = work.microbatches(largest.step)
    budget = _with_reserve(
        work.budget if limit_bytes is None else work.budget.at_most(limit_bytes),
        average.nbytes + work.bytes_beside(microbatches, largest.place) + bucket_bytes(work.model, work.group),
    )
    applied = _fit_together(config, work, budget, to_device(microbatches[largest.place], work.device), largest)
    try:
        _prepare_other_sizes(work, applied, largest, first_step, total_steps)
    except BaseException:
        applied.remove()
        raise
    return applied, budget


def unused_parameters_of(config: TrainConfig, work: Workload, applied: tightfit.Applied) -> UnusedParameters:
    """Find which parameters a step leaves without a gradient, in any process.  All processes call this."""
    if work.group.is_single_process or is_sharded(work.model):
        return UnusedParameters.NONE
    if config.ddp_find_unused_parameters == "on":
        return UnusedParameters.VARYING
    return max(work.group.all_gather(find_unused_parameters(work.model, work.microbatch(0), applied, work.spec())))


def _with_reserve(budget: Budget, beside_bytes: int) -> Budget:
    if beside_bytes >= budget.total_bytes:
        raise UnsupportedInput(
            f"the budget is {format_bytes(budget.total_bytes)}, but the moving average of the weights and the other "
            f"microbatches of a batch alone take {format_bytes(beside_bytes)}. Give more --memory, or leave out "
            f"--ema-decay."
        )
    return budget.reserving(beside_bytes)


def _fit_together(
    config: TrainConfig, work: Workload, budget: Budget, batch: Microbatch, largest: LargestMicrobatch
) -> tightfit.Applied:
    """`fit` in every process, with one measurement for all where that is possible."""
    reference = config.reference_memory
    reference_bytes = (
        None if reference is None else Budget.of(reference, work.device, name="--reference-memory").total_bytes
    )

    def fitted(profile: Profile | None) -> tightfit.Applied:
        with naming_batch(batch, largest), warnings.catch_warnings():
            warnings.simplefilter("ignore", ProofWarning)  # the run says it in a line of its own
            return tightfit.fit(
                work.model,
                batch,
                budget=budget,
                loss=work.task.loss,
                optimizer=work.optimizer,
                accumulation_steps=work.accumulation_steps,
                autocast=work.autocast,
                clip_norm=work.clip_norm,
                exclude=work.excluded,
                grad_checkpoint=config.grad_checkpoint,
                reference_budget_bytes=reference_bytes,
                profile=profile,
                memory_cap=config.memory_cap,
            )

    group = work.group
    if is_sharded(work.model):  # no step without all of them
        try:
            return fitted(None)
        except (BudgetInfeasible, VerificationFailed) as problem:
            is_everyones = problem.__cause__ is None  # else an error on this rank is behind it
            if is_everyones and not group.is_main_process:  # said once
                is_bad_input = isinstance(problem, BudgetInfeasible)
                raise RankFailed(0, str(problem), is_bad_input=is_bad_input) from None
            raise
    # Rank 0 measures, alone on its node's cores; where all have batches of the same sizes, all then solve the same.
    mine = group.run_on_all(lambda: fitted(None) if group.is_main_process else None)
    profile = group.broadcast(None if mine is None else mine.profile)
    return group.run_on_all(lambda: fitted(profile) if mine is None else mine)


def _prepare_other_sizes(
    work: Workload, applied: tightfit.Applied, largest: LargestMicrobatch, first_step: int, total_steps: int
) -> None:
    # Weighing microbatches may take an all-reduce, so it comes first: inside `together` one process may end before
    # another.
    steps = work.order.sizes(first_step, total_steps).values()
    others = {step: work.microbatches(step) for step in steps}

    def prepare() -> None:
        for step, microbatches in others.items():
            for place, microbatch in enumerate(microbatches):
                batch = to_device(microbatch, work.device)
                numbers = work.loader.numbers(step)[place]
                with naming_batch(batch, replace(largest, step=step, place=place, numbers=numbers)):
                    applied.prepare(batch)

    work.group.run_on_all(prepare)
