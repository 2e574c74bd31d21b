"""Which plan a batch of another size takes where the allocator caches what is freed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.solver.profiles import gpt_profile
from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.planning.shared_cache import SharedCache
from tightfit.records import AllocatorState, Plan
from tightfit.simulation.reserved import totals_in_turn
from tightfit.simulation.step_requests import StepRequests, requests_of
from tightfit.solver.solver import Solver

MIB = 2**20
STATE = AllocatorState(settings="", capacity_bytes=2**36, beside_bytes=64 * MIB, outside_bytes=500 * MIB)


def solver_for(tokens: int) -> Solver:
    return Solver(replace(gpt_profile(6, tokens=tokens), allocator=STATE))


def requests(solver: Solver, plan: Plan) -> StepRequests:
    return requests_of(solver.index, plan.decisions, plan.shared_tapes)


def rivals(solver: Solver, budget_bytes: int) -> Iterator[Plan]:
    smallest = solver.smallest().peak_bytes
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        yield solver.solve(smallest + int(share * (budget_bytes - smallest)))


def test_a_smaller_size_takes_the_fastest_plan_that_keeps_the_budget_behind_the_largest() -> None:
    large, small = solver_for(1024), solver_for(700)
    smallest, plain = large.smallest().peak_bytes, large.plain(0).predicted_peak_bytes
    budget = smallest + (plain - smallest) // 3
    first = large.solve(budget)
    cache, resolved = SharedCache(budget), ResolvedPlan.of(first)
    cache.join(large.index, resolved)
    assert resolved.may_find_bytes == first.predicted_peak_bytes <= budget

    fitting = list(rivals(small, budget))
    assert all(plan.predicted_peak_bytes <= budget for plan in fitting)
    in_turn = [totals_in_turn([requests(large, first), requests(small, plan)], STATE) for plan in fitting]
    assert in_turn[0] > budget  # alone it keeps the budget
    chosen = next(plan for plan, total in zip(fitting, in_turn, strict=True) if total <= budget)
    assert cache.fastest(small.index, rivals(small, budget)) == chosen

    alone, together = ResolvedPlan.of(fitting[0]), ResolvedPlan.of(chosen)
    cache.join(small.index, alone)
    cache.join(small.index, together)
    assert alone.may_find_bytes == 0
    assert budget >= together.may_find_bytes == resolved.may_find_bytes
    assert together.needs_no_more_than(resolved)
    assert not resolved.needs_no_more_than(together)
    assert not alone.needs_no_more_than(resolved) or alone.may_find_bytes == 0


def test_where_no_plan_shares_the_cache_it_is_the_fastest() -> None:
    large, small = solver_for(1024), solver_for(1000)
    budget = large.smallest().peak_bytes
    cache = SharedCache(budget)
    cache.join(large.index, ResolvedPlan.of(large.smallest_plan()))
    plain = small.plain(budget)
    assert cache.fastest(small.index, [plain, small.full(budget)]) is plain


def test_a_device_without_a_cache_takes_the_fastest_plan() -> None:
    solver = Solver(gpt_profile(2))
    cache, plan = SharedCache(1), solver.plain(2**40)
    resolved = ResolvedPlan.of(plan)
    cache.join(solver.index, resolved)
    assert cache.fastest(solver.index, iter([plan])) is plan
    assert resolved.may_find_bytes == 0
