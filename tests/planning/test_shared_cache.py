"""Which plan a batch of another size takes where the allocator caches what is freed."""

from __future__ import annotations

from dataclasses import replace

from tests.solver.profiles import gpt_profile
from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.planning.shared_cache import SharedCache
from tightfit.records import AllocatorState, Plan
from tightfit.simulation.reserved import totals_in_turn
from tightfit.simulation.step_requests import requests_of
from tightfit.solver.solver import Solver

MIB = 2**20
STATE = AllocatorState(settings="", capacity_bytes=2**36, beside_bytes=64 * MIB, outside_bytes=500 * MIB)


def solver_for(tokens: int) -> Solver:
    return Solver(replace(gpt_profile(2, tokens=tokens), allocator=STATE))


def in_turn(*steps: tuple[Solver, Plan]) -> int:
    return totals_in_turn([requests_of(one.index, plan.decisions, plan.shared_tapes) for one, plan in steps], STATE)


def test_a_smaller_size_takes_the_fastest_plan_that_keeps_the_budget_behind_the_largest() -> None:
    large, small = solver_for(1024), solver_for(900)
    first = large.full(0)
    plain, lesser = small.plain(0), small.full(0)
    budget = in_turn((large, first), (small, lesser))
    assert budget < in_turn((large, first), (small, plain))
    cache, resolved = SharedCache(budget), ResolvedPlan.of(first)
    cache.join(large.index, resolved)
    assert resolved.may_find_bytes == in_turn((large, first)) <= budget
    assert cache.fastest(small.index, iter([plain, lesser])) is lesser
    assert cache.fastest(small.index, iter([plain])) is plain  # the cache is then given back around its steps

    alone, together = ResolvedPlan.of(plain), ResolvedPlan.of(lesser)
    cache.join(small.index, alone)
    cache.join(small.index, together)
    assert alone.may_find_bytes == 0
    assert resolved.may_find_bytes == together.may_find_bytes == budget
    assert together.needs_no_more_than(resolved)
    assert not resolved.needs_no_more_than(together)
    assert not together.needs_no_more_than(alone)


def test_a_device_without_a_cache_takes_the_fastest_plan() -> None:
    solver = Solver(gpt_profile(2))
    cache, plan = SharedCache(1), solver.plain(2**40)
    resolved = ResolvedPlan.of(plan)
    cache.join(solver.index, resolved)
    assert cache.fastest(solver.index, iter([plan])) is plan
    assert resolved.may_find_bytes == 0
