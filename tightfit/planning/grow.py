"""`grow`: the largest batch that trains within a memory budget, found on profiles and confirmed by a measured step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from tightfit.device.budget import Budget
from tightfit.device.described.cards import card_for
from tightfit.device.described.gpu import DescribedDevice
from tightfit.device.registry import standing_in
from tightfit.errors import BudgetInfeasible, UnsupportedInput
from tightfit.interrupts import waiting_interrupts
from tightfit.planning.largest import largest_within
from tightfit.planning.search import find_plan
from tightfit.profiling.measure import measure_described, measure_step
from tightfit.progress import showing_when_long
from tightfit.records import Plan, Profile
from tightfit.solver.solver import solver_of
from tightfit.step.exclude import Exclude, excluded_paths
from tightfit.step.model import check_model, device_of
from tightfit.step.models import as_model
from tightfit.step.step import LossFunction, Optimizers, Step, as_step

#: Makes a batch of so many samples.
MakeBatch = Callable[[int], Any]

#: Samples of the largest batch that is looked for, where nothing else is said.
_MOST = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BatchTimes:
    """What a sample takes in a batch of some size, in milliseconds; None where the batch does not fit that way."""

    batch_size: int
    plain_ms: float | None
    full_ms: float | None
    """With every region recomputed, as a checkpoint around every block does."""
    planned_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The largest batches within a budget.

        found = tightfit.grow(model, lambda n: torch.randn(n, 64), budget="8GiB", loss=loss_fn)
        print(found.largest, found.best)

    Attributes:
        largest: samples of the largest batch for which there is a plan.
        plan: for that batch.
        plain_largest: of the largest batch that needs none; 0 if not one sample does without.
        full_largest: of the largest that fits with every region recomputed.
        times: what a sample takes in some batches, the smallest first.
        confirmed: whether a step of the largest batch was run within the budget.
        most: the largest number that was tried: where that fits, a larger one may, too.
    """

    largest: int
    plan: Plan
    plain_largest: int
    full_largest: int
    times: tuple[BatchTimes, ...]
    confirmed: bool
    most: int

    @property
    def best(self) -> int:
        """Samples of the batch in which one takes the least time, of those that were compared."""
        return min(self.times, key=lambda one: one.planned_ms or float("inf")).batch_size


@showing_when_long()
@waiting_interrupts()
def grow(
    model: torch.nn.Module,
    make_batch: MakeBatch,
    *,
    budget: int | str | Budget = "auto",
    step: Step | None = None,
    loss: LossFunction | None = None,
    optimizer: Optimizers = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    exclude: Exclude = (),
    device: str | None = None,
    most: int = _MOST,
) -> Growth:
    """Find the largest batch that trains within a budget.

        found = tightfit.grow(
            model, lambda n: torch.randn(n, 512), budget="8GiB", loss=loss_fn, optimizer=optimizer
        )
        print(found.largest, found.plain_largest)

    Batches are measured without data, four or five of them.  A step of the largest is then run, with the optimizer's
    step, and where it needs more than was predicted, one of the next smaller.  The model is left as it was.

    Args:
        model: as for `measure`.
        make_batch: called with a number of samples, or with whatever else is to be large, such as a length; returns
            the batch.
        budget: as for `fit`.
        step, loss, optimizer, accumulation_steps, autocast, clip_norm, exclude: as for `measure`.
        device: as for `measure`: a GPU that is not here, where no step can confirm what is found.
        most: the largest number that is tried.

    Returns:
        `Growth`.

    Raises:
        BudgetInfeasible: one sample needs more than the budget.
        UnsupportedInput: as `measure`; or `most` is below 1.
    """
    if most < 1:
        raise UnsupportedInput(f"most={most} leaves no batch to try. Give 1 or more.")
    one = as_model(model)
    check_model(one)
    step = as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    step = replace(step, excluded=excluded_paths(one, exclude)).starting(one)
    if device is None:
        total_bytes = Budget.of(budget, device_of(one)).step_bytes
        return grow_step(one, make_batch, step, total_bytes, most=most)
    card = DescribedDevice(card_for(device))
    with standing_in(card):
        total_bytes = Budget.of(budget, card.torch_device).step_bytes
    return grow_step(one, make_batch, step, total_bytes, described=card, most=most)


def grow_step(
    model: torch.nn.Module,
    make_batch: MakeBatch,
    step: Step,
    budget_bytes: int,
    *,
    described: DescribedDevice | None = None,
    most: int = _MOST,
) -> Growth:
    """Find the largest batch of a step; see `grow`.  `described`: where the step is to run, if that is not here."""
    batches = _Batches(model, make_batch, step, budget_bytes, described)
    # Which takes no search, and says where to begin the one that does.
    full_largest = largest_within(batches.full_bytes, budget_bytes, most=most)
    largest = largest_within(batches.smallest_bytes, budget_bytes, most=most, begin=full_largest)
    if not largest:
        raise batches.infeasible()
    plan = None
    if described is None:
        largest, plan = _confirmed(model, make_batch, step, budget_bytes, largest)
    plain_largest = largest_within(batches.plain_bytes, budget_bytes, most=largest)
    full_largest = min(full_largest, largest)
    compared = {max(1, plain_largest // 2), max(1, plain_largest), max(1, full_largest), largest}
    return Growth(
        largest=largest,
        plan=plan or solver_of(batches.timed(largest)).solve(budget_bytes),
        plain_largest=plain_largest,
        full_largest=full_largest,
        times=tuple(batches.times(number) for number in sorted(compared)),
        confirmed=described is None,
        most=most,
    )


def _confirmed(
    model: torch.nn.Module, make_batch: MakeBatch, step: Step, budget_bytes: int, largest: int
) -> tuple[int, Plan]:
    """Run a step of the largest batch, or of the next smaller one that holds."""
    for number in range(largest, 1, -1):
        with suppress(BudgetInfeasible):
            return number, find_plan(model, make_batch(number), step, budget_bytes, within_budget=True).plan
    return 1, find_plan(model, make_batch(1), step, budget_bytes, within_budget=True).plan


class _Batches:
    """What batches of each size need, measured once."""

    def __init__(
        self,
        model: torch.nn.Module,
        make_batch: MakeBatch,
        step: Step,
        budget_bytes: int,
        described: DescribedDevice | None,
    ) -> None:
        self._model = model
        self._make_batch = make_batch
        self._step = step
        self._budget_bytes = budget_bytes
        self._described = described
        self._known: dict[tuple[int, bool], Profile] = {}

    def smallest_bytes(self, number: int) -> int:
        """Return the smallest budget for which there is a plan."""
        return solver_of(self._profile(number, timed=False)).smallest().peak_bytes

    def plain_bytes(self, number: int) -> int:
        """Return what the plain step needs."""
        return solver_of(self._profile(number, timed=False)).plain(0).predicted_peak_bytes

    def full_bytes(self, number: int) -> int:
        """Return what it needs with every region recomputed."""
        return solver_of(self._profile(number, timed=False)).full(0).predicted_peak_bytes

    def infeasible(self) -> BudgetInfeasible:
        """Return the error that says what one sample needs."""
        plan = solver_of(self._profile(1, timed=False)).smallest_plan()
        return BudgetInfeasible(plan.predicted_peak_bytes, self._budget_bytes, plan.peak_where, plan.breakdown)

    def timed(self, number: int) -> Profile:
        """Return the profile of a batch with the times of its operations."""
        return self._profile(number, timed=True)

    def times(self, number: int) -> BatchTimes:
        """Return what a sample takes in the batch, each way."""
        solver = solver_of(self.timed(number))

        def within(plans: Iterable[Plan]) -> float | None:
            fitting = (plan for plan in plans if plan.predicted_peak_bytes <= self._budget_bytes)
            return next((plan.predicted_step_ms / number for plan in fitting), None)

        planned = []
        with suppress(BudgetInfeasible):
            planned = [solver.solve(self._budget_bytes)]
        return BatchTimes(
            batch_size=number,
            plain_ms=within([solver.plain(self._budget_bytes)]),
            full_ms=within([solver.full(self._budget_bytes)]),
            planned_ms=within(planned),
        )

    def _profile(self, number: int, *, timed: bool) -> Profile:
        key = number, timed or self._described is not None
        if key not in self._known:
            batch = self._make_batch(number)
            self._known[key] = (
                measure_described(self._model, batch, self._step, self._described)
                if self._described is not None
                else measure_step(self._model, batch, self._step, untimed=not timed, budget_bytes=self._budget_bytes)
            )
        return self._known[key]
