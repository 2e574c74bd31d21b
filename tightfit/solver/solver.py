"""Solve a profile for a budget: `solve` for one budget, `Solver` for several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from tightfit.errors import BudgetInfeasible
from tightfit.progress import showing_when_long
from tightfit.records import Decision, Plan, Profile, SharedTape
from tightfit.simulation.levers import BY_VALUE, LEVERS
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.reserved import simulate_in_totals
from tightfit.simulation.simulator import Simulation, simulate
from tightfit.solver.assignment import Assignment
from tightfit.solver.column_generation import ColumnPool
from tightfit.solver.columns import ColumnSource
from tightfit.solver.effort import SOLVE_WORK, Effort
from tightfit.solver.lower_bound import added_ms_bound
from tightfit.solver.plan_builder import build_plan
from tightfit.solver.recursive import RecursivePlans
from tightfit.solver.single_region import refine

#: Recursive recomputation is looked at where a plan without it adds at least this share of what the smallest such adds.
_RECURSIVE_SHARE = 0.9
#: Part of the budget above what is resident that a plan leaves free where what runs depends on the data: so much more
#: may another batch hold at the plan's own peak. The plain step and the smallest plan are taken where they fit as
#: measured: no budget is refused because of the margin.
DATA_DEPENDENT_MARGIN = 0.05
#: How far a plan's time may be from the best choice among the columns, in parts of the plain step.
_TIME_GAP = 1e-9
#: Limits of allocated bytes that are solved for until what is reserved is close to the budget; how many of them are
#: guessed from how far the last one exceeded it, before the search halves what is between; and how close is enough.
_MOST_LIMITS = 8
_MOST_GUESSES = 2
_NEAR_LIMIT = 0.01


class Solver:
    """Solve one profile for any number of budgets; the columns are made once, when a budget first needs them."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.index = ProfileIndex(profile)
        self._solved: dict[int, Plan] = {}
        self._of_limits: dict[int, Plan] = {}  # by the limit of allocated bytes, see `_solve_in_totals`

    @cached_property
    def _plain(self) -> Simulation:
        return simulate_in_totals(self.index, [None] * len(self.profile.regions))

    @cached_property
    def _source(self) -> ColumnSource:
        return ColumnSource(self.index)

    @cached_property
    def _structure(self) -> ColumnPool:
        return ColumnPool(self._source.repriced(self.profile.with_unit_times()))

    @cached_property
    def _pool(self) -> ColumnPool:
        return ColumnPool(self._source, self._structure)

    def plain(self, budget_bytes: int) -> Plan:
        """Return the plan that leaves every region untouched, whether or not it fits the budget."""
        return build_plan(self.index, [None] * len(self.profile.regions), budget_bytes, plain=self._plain)

    def full(self, budget_bytes: int) -> Plan:
        """Return the plan that drops all that may be dropped in every region, whether or not it fits the budget."""
        decisions = [self._fullest(region) for region in range(len(self.profile.regions))]
        return build_plan(self.index, decisions, budget_bytes, plain=self._plain)

    def _fullest(self, region: int) -> Decision | None:
        """Return the decision that drops most in a region."""
        facts = self.index.facts[region]
        if facts.only_again:
            return next(decision for lever in LEVERS for decision in lever.offers(self.index, [region]))
        return BY_VALUE.decide(()) if facts.slots else None

    def minimum_budget(self) -> tuple[int, str]:
        """Return the smallest budget in bytes for which `solve` has a plan, and what sets it."""
        smallest = self.smallest()
        return smallest.peak_bytes, smallest.peak_where

    def plain_step(self) -> Simulation:
        """Return the step that leaves every region untouched."""
        return self._plain

    def smallest(self) -> Simulation:
        """Return the step with the smallest peak."""
        return self._smallest[0]

    def smallest_plan(self) -> Plan:
        """Return the plan with the smallest peak, which is its budget.  It follows from sizes, not from times."""
        found, decisions, shared = self._smallest
        return build_plan(self.index, decisions, found.peak_bytes, 0.0, self._plain, shared)

    @cached_property
    def _smallest(self) -> tuple[Simulation, Sequence[Decision | None], Sequence[SharedTape]]:
        best = self.smallest_at_one_level(), self._structure.smallest[1], tuple[SharedTape, ...]()
        state = self.profile.allocator
        if self._plain.peak_bytes <= self._one_level.peak_bytes:  # to drop something would be of no use
            decisions: list[Decision | None] = [None] * len(self.profile.regions)
            plain = self._plain if state is None else simulate_in_totals(self.index, decisions)
            if plain.peak_bytes <= best[0].peak_bytes:
                best = plain, decisions, ()
        more_bytes = 0 if state is None else state.beside_bytes + state.outside_bytes
        # What is allocated cannot be more than the totals, which take long to find: most rivals are out of it by that.
        most_bytes = best[0].peak_bytes - more_bytes - 1
        if state is None:
            rivals = [one] if (one := self._recursive.smallest(most_bytes)) is not None else []
        else:
            rivals = sorted(self._recursive.within(most_bytes), key=lambda one: one.simulation.peak_bytes)
        for one in rivals:
            if one.simulation.peak_bytes + more_bytes >= best[0].peak_bytes:
                break
            walked = one.simulation
            if state is not None:
                walked = simulate_in_totals(self.index, one.decisions, one.shared_tapes)
            if walked.peak_bytes < best[0].peak_bytes:
                best = walked, one.decisions, tuple(one.shared_tapes)
        return best

    def smallest_at_one_level(self) -> Simulation:
        """Return the step with the smallest peak without recursive recomputation."""
        return self._one_level_in_totals

    @cached_property
    def _one_level_in_totals(self) -> Simulation:
        if self.profile.allocator is None:
            return self._one_level
        return simulate_in_totals(self.index, self._structure.smallest[1])

    @cached_property
    def _one_level(self) -> Simulation:
        return simulate(self.index, self._structure.smallest[1])

    @cached_property
    def _recursive(self) -> RecursivePlans:
        """Plans of recursive recomputation.

        Those that add much less time than the smallest other plan are left out: with them, time could rise with the
        budget where they are not looked at (see `_solve`).
        """
        least_ms = _RECURSIVE_SHARE * (self._one_level.step_ms - self._plain.step_ms)
        return RecursivePlans(self.index, self._plain.step_ms + least_ms)

    def solve(self, budget_bytes: int) -> Plan:
        """Return the fastest plan whose predicted peak is within the budget.

        Raises:
            BudgetInfeasible: no plan is; the error carries the smallest budget that has one.
        """
        if self._plain.peak_bytes <= budget_bytes:
            return self.plain(budget_bytes)
        usable_bytes = self._usable_bytes(budget_bytes)
        if usable_bytes not in self._solved:
            solve = self._solve if self.profile.allocator is None else self._solve_in_totals
            self._solved[usable_bytes] = self._not_slower(solve(usable_bytes))
        return replace(self._solved[usable_bytes], budget_bytes=budget_bytes)

    def _usable_bytes(self, budget_bytes: int) -> int:
        """Return what a plan may use of the budget: all but the margin, and enough for the smallest plan if it fits."""
        if not self.profile.data_dependent:
            return budget_bytes
        spare_bytes = max(0, budget_bytes - self.profile.baseline_bytes)
        return max(
            budget_bytes - math.ceil(DATA_DEPENDENT_MARGIN * spare_bytes),
            min(budget_bytes, self.smallest().peak_bytes),
        )

    def least_budget(self, peak_bytes: int) -> int:
        """Return the smallest budget of which a plan may use that much."""
        if not self.profile.data_dependent or peak_bytes in (self._plain.peak_bytes, self.smallest().peak_bytes):
            return peak_bytes
        resident_bytes = self.profile.baseline_bytes
        budget_bytes = resident_bytes + int((peak_bytes - resident_bytes) / (1 - DATA_DEPENDENT_MARGIN))
        while self._usable_bytes(budget_bytes) < peak_bytes:
            budget_bytes += 1
        while self._usable_bytes(budget_bytes - 1) >= peak_bytes:
            budget_bytes -= 1
        return min(budget_bytes, self._plain.peak_bytes)

    def _solve_in_totals(self, budget_bytes: int) -> Plan:
        """Return the fastest plan found for which the process holds no more than the budget.

        What the allocator reserves beyond what is allocated is known of a plan, not before.  So plans are solved for
        limits of what is allocated: the next one lower by what the last one was too much, soon halfway between one that
        fits, or the smallest there is, and one that exceeds.
        """
        state = self.profile.allocator
        assert state is not None
        if budget_bytes < self.smallest().peak_bytes:  # what is named as the smallest budget is it, by chance or not
            raise self._infeasible(budget_bytes)
        smallest = self._recursive.smallest(self._one_level.peak_bytes)
        least_bytes = self._one_level.peak_bytes if smallest is None else smallest.simulation.peak_bytes
        highest_bytes = budget_bytes - state.outside_bytes - state.beside_bytes
        for tried in range(_MOST_LIMITS):
            over_bytes = {limit: plan.predicted_peak_bytes - budget_bytes for limit, plan in self._of_limits.items()}
            fits_bytes = max((limit for limit, over in over_bytes.items() if over <= 0), default=least_bytes - 1)
            exceeds_bytes = min((limit for limit in over_bytes if limit > fits_bytes), default=None)
            end_bytes = min(highest_bytes + 1, exceeds_bytes or highest_bytes + 1)
            if end_bytes - fits_bytes < budget_bytes * _NEAR_LIMIT:
                break
            limit_bytes = highest_bytes
            if exceeds_bytes is not None:
                limit_bytes = min(limit_bytes, exceeds_bytes - over_bytes[exceeds_bytes])
                if fits_bytes >= least_bytes or tried >= _MOST_GUESSES or limit_bytes <= least_bytes:
                    limit_bytes = (fits_bytes + end_bytes) // 2
            self._of_limits[limit_bytes] = self._solve(limit_bytes)
        fitting = [plan for plan in self._of_limits.values() if plan.predicted_peak_bytes <= budget_bytes]
        found = min(fitting, key=lambda plan: plan.predicted_step_ms, default=None)
        return replace(found or self.smallest_plan(), budget_bytes=budget_bytes)

    def _infeasible(self, budget_bytes: int) -> BudgetInfeasible:
        required, where = self.minimum_budget()
        profile, breakdown = self.profile, self.smallest().breakdown
        return BudgetInfeasible(
            required, budget_bytes, where, breakdown, switched_off=profile.switched_off, unproven=profile.unproven
        )

    def _solve(self, budget_bytes: int) -> Plan:
        """Return the fastest plan whose allocated bytes are within the budget."""
        one_level = self._one_level
        if budget_bytes >= one_level.peak_bytes:
            plan = self._solve_at_one_level(budget_bytes)
            added_ms = plan.predicted_step_ms - plan.plain_step_ms
            if added_ms < _RECURSIVE_SHARE * (one_level.step_ms - self._plain.step_ms):
                return plan
            recursive = self._fastest_recursive(budget_bytes)
            return plan if recursive is None or recursive.predicted_step_ms >= plan.predicted_step_ms else recursive
        found = self._fastest_recursive(budget_bytes)
        if found is None:
            raise self._infeasible(budget_bytes)
        return found

    def _fastest_recursive(self, budget_bytes: int) -> Plan | None:
        """Return the fastest plan of recursive recomputation that fits. Its only bound is the plain step."""
        fitting = self._recursive.within(budget_bytes)
        if not fitting:
            return None
        best = min(fitting, key=lambda c: (c.simulation.step_ms, c.simulation.peak_bytes))
        return build_plan(self.index, best.decisions, budget_bytes, 0.0, self._plain, best.shared_tapes)

    def _solve_at_one_level(self, budget_bytes: int) -> Plan:
        pool = self._pool
        effort = Effort(SOLVE_WORK)
        relaxation = pool.master.relaxed(budget_bytes)
        bounds = [added_ms_bound(pool, relaxation.prices, budget_bytes, effort) if relaxation else 0.0]
        gap_ms = max(1e-9, _TIME_GAP * self._plain.step_ms)
        decisions, bound_of_columns = pool.master.fastest(budget_bytes, gap_ms) or (self._structure.smallest[1], 0.0)
        if pool.is_complete:
            bounds.append(bound_of_columns * (1 - 1e-9))
        decisions, bound_of_region = refine(pool, decisions, budget_bytes, effort)
        decisions = self._lighten(decisions, budget_bytes)
        plan = build_plan(self.index, decisions, budget_bytes, max(*bounds, bound_of_region), self._plain)
        in_solver_terms = plan.predicted_peak_bytes
        if (state := self.profile.allocator) is not None:
            cached_bytes = plan.predicted_reserved_bytes - plan.predicted_allocated_bytes
            in_solver_terms -= cached_bytes + state.beside_bytes + state.outside_bytes
        assert in_solver_terms <= budget_bytes, "a plan's columns and its simulation disagree"
        return plan

    def _not_slower(self, plan: Plan) -> Plan:
        """Return the plan, or one found for a smaller budget if the counted search left that one faster."""
        rivals = [rival for budget, rival in self._solved.items() if budget < plan.budget_bytes]
        fastest = min([plan, *rivals], key=lambda rival: rival.predicted_step_ms)
        if fastest.predicted_step_ms == plan.predicted_step_ms:
            return plan
        return replace(fastest, budget_bytes=plan.budget_bytes, lower_bound_ms=plan.lower_bound_ms)

    def _lighten(self, decisions: list[Decision | None], budget_bytes: int) -> list[Decision | None]:
        """Return an equally fast plan: untouched where that is free, else holding fewer bytes where that is free."""
        source, master = self._pool.source, self._pool.master
        choice = Assignment(source, decisions)
        for region, record in enumerate(self.profile.regions):
            now = choice.columns[region]
            if now.decision is None:
                continue
            rivals = [source.column(region, decision) for decision in master.decisions[record.class_id]]
            better = [
                column
                for column in rivals
                if all(column.added_ms(cut) <= now.added_ms(cut) for cut in master.cuts)
                and (column.decision is None or column.held_bytes < now.held_bytes)
            ]
            for column in sorted(better, key=lambda c: (c.decision is not None, c.held_bytes)):
                if choice.exchange(column, budget_bytes):
                    break
        lighter = [column.decision for column in choice.columns]
        if not source.cuts.is_single:  # not all ways were looked at
            before, after = (source.longest_way(master.chosen(found))[1] for found in (decisions, lighter))
            return decisions if source.cuts.is_longer(after, before) else lighter
        return lighter


_last_solver: Solver | None = None


def solver_of(profile: Profile) -> Solver:
    """Return the profile's solver. The last one is kept: several questions about one profile make its columns once.

    A profile that was read from a file is the one that was written.
    """
    global _last_solver
    found = _last_solver
    if found is None or (found.profile is not profile and found.profile != profile):
        found = _last_solver = Solver(profile)
    return found


@showing_when_long()
def solve(profile: Profile, budget_bytes: int) -> Plan:
    """Solve for what to keep and what to recompute: the fastest plan whose predicted peak is within the budget.

        profile = tightfit.measure(model, batch, loss=loss_fn, optimizer=optimizer)
        plan = tightfit.solve(profile, budget_bytes=8 * 2**30)

    Needs no PyTorch.  Predicted time never rises with the budget.  The search is limited by counted work, so that every
    machine finds the same plan: `Plan.lower_bound_ms` says how far from the best it may be.

    Args:
        profile: a measured step, from `measure` or `Profile.load`.
        budget_bytes: the most device memory that the step may hold at any moment.

    Returns:
        `Plan`: for `apply`, `verify`, or a file.

    Raises:
        BudgetInfeasible: no plan is; the error carries the smallest budget that has one, and what sets it.
    """
    return solver_of(profile).solve(budget_bytes)


def plain_plan(profile: Profile, budget_bytes: int) -> Plan:
    """Return the plan that leaves every region untouched. Its `predicted_peak_bytes` may be above the budget."""
    return solver_of(profile).plain(budget_bytes)


def full_plan(profile: Profile, budget_bytes: int) -> Plan:
    """Return the plan that drops all that may be dropped. Its `predicted_peak_bytes` may be above the budget."""
    return solver_of(profile).full(budget_bytes)


def minimum_budget(profile: Profile) -> tuple[int, str]:
    """Return the smallest budget in bytes for which `solve` has a plan, and what sets it."""
    return solver_of(profile).minimum_budget()
