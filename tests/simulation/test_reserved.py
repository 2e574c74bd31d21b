"""What the allocator reserves for a step, and plans whose reserved bytes keep a budget."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.solver.profiles import gpt_profile, random_profile
from tightfit.errors import BudgetInfeasible
from tightfit.records import AllocatorState, Decision, Event, EventKind, Plan, Profile, Storage
from tightfit.simulation import reserved
from tightfit.simulation.caching_allocator import CachingAllocator
from tightfit.simulation.levers import Request, Requests
from tightfit.simulation.levers.module import can_recompute_module
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.reserved import (
    reserved_for,
    saved_by_growing_segments,
    simulate_in_totals,
    totals_in_turn,
)
from tightfit.simulation.simulator import simulate
from tightfit.simulation.step_requests import BECOMES_GRADIENT, StepRequests, requests_of
from tightfit.solver.recursive import RecursivePlans
from tightfit.solver.solver import Solver

MIB = 2**20
STATE = AllocatorState(settings="", capacity_bytes=2**36, beside_bytes=64 * MIB, outside_bytes=500 * MIB)


def large_profile() -> Profile:
    return replace(gpt_profile(2), allocator=STATE)


def test_totals_count_the_cache_the_context_and_what_is_beside_the_step() -> None:
    profile = large_profile()
    index = ProfileIndex(profile)
    nothing = [None] * len(profile.regions)
    walked, totals = simulate(index, nothing), simulate_in_totals(index, nothing)
    assert totals.allocated_bytes == walked.peak_bytes + STATE.beside_bytes
    assert totals.reserved_bytes >= totals.allocated_bytes
    assert totals.peak_bytes == totals.reserved_bytes + STATE.outside_bytes == sum(totals.breakdown.values())
    without = replace(profile, allocator=None)
    assert simulate_in_totals(ProfileIndex(without), nothing) == simulate(ProfileIndex(without), nothing)


def test_a_budget_is_for_all_that_is_reserved() -> None:
    solver = Solver(large_profile())
    smallest, _ = solver.minimum_budget()
    plain = solver.plain(0).predicted_peak_bytes
    for share in (0.0, 0.5):
        budget = int(smallest + share * (plain - smallest))
        plan = solver.solve(budget)
        assert plan.budget_bytes == budget
        assert plan.predicted_peak_bytes <= budget
        assert plan.predicted_allocated_bytes <= plan.predicted_reserved_bytes
        assert plan.predicted_reserved_bytes + STATE.outside_bytes == plan.predicted_peak_bytes
        plan.check()
    assert solver.solve(plain).is_plain
    with pytest.raises(BudgetInfeasible) as refused:
        solver.solve(smallest - 1)
    assert refused.value.required_bytes == smallest


def test_where_much_more_is_reserved_than_allocated_the_plan_is_not_the_smallest() -> None:
    class Wasteful(Solver):
        """As if so much were reserved that the difference to the budget led below the smallest plan."""

        def _solve(self, budget_bytes: int) -> Plan:
            times = {"predicted_step_ms": 2**40 / budget_bytes}
            return replace(self.smallest_plan(), predicted_peak_bytes=4 * budget_bytes - 3 * least, **times)

    profile = replace(gpt_profile(1), allocator=replace(STATE, beside_bytes=0, outside_bytes=0))
    least = Solver(profile).smallest().peak_bytes
    budget = least * 9 // 5
    plan = Wasteful(profile).solve(budget)
    assert 0.75 * budget <= plan.predicted_peak_bytes <= budget


def test_a_budget_is_filled_although_much_of_what_is_no_longer_allocated_stays_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The search went down by what the last plan was too much, met its end, and took the slowest plan there is."""
    solver = Solver(large_profile())
    smallest, plain = solver.smallest_plan(), solver.plain(0).predicted_peak_bytes
    budget = (smallest.predicted_peak_bytes + plain) // 2
    highest = budget - STATE.outside_bytes - STATE.beside_bytes
    fits = highest - (highest - smallest.predicted_allocated_bytes + STATE.beside_bytes) // 3
    limits: list[int] = []

    def of_limit(limit: int) -> Plan:
        limits.append(limit)
        return replace(
            smallest, predicted_peak_bytes=budget + (limit - fits) // 4, predicted_step_ms=1e3 - limit / 2**40
        )

    monkeypatch.setattr(solver, "_solve", of_limit)
    plan = solver.solve(budget)
    assert budget * 0.99 < plan.predicted_peak_bytes <= budget
    assert len(limits) == len(set(limits)) <= 8
    assert solver.solve(budget - 1).predicted_peak_bytes < budget


@pytest.mark.parametrize("seed", range(40))
def test_what_is_asked_for_adds_up_to_what_the_simulator_counts(seed: int) -> None:
    profile = random_profile(seed, regions=4)
    if seed % 2:  # an operation's result can be empty
        chance = random.Random(seed)
        storages = tuple(
            one if one.component != "activation" or chance.random() < 0.8 else replace(one, nbytes=0)
            for one in profile.storages
        )
        profile = replace(profile, storages=storages)
    profile = replace(profile, regions=tuple(replace(one, module_recomputable=True) for one in profile.regions))
    index = ProfileIndex(profile)
    whole = [Decision("module") if can_recompute_module(index, region) else None for region in range(len(index.facts))]
    full = [Decision("tape") if facts.slots else None for facts in index.facts]
    plans = [([None] * len(full), ()), (full, ()), (whole, ())]
    plans += [(list(one.decisions), one.shared_tapes) for one in RecursivePlans(index).within(float("inf"))]
    for decisions, shared in plans:
        step = requests_of(index, decisions, shared)
        alive: dict[int, int] = {}
        level = highest = 0
        for thing, nbytes, _ in (*step.forward_backward, *step.optimizer):
            if nbytes > 0:
                assert thing not in alive
                alive[thing] = nbytes
                level += nbytes
            else:
                level -= alive.pop(thing)
            highest = max(highest, level)
        walked = simulate(index, decisions, shared)
        counted = walked.peak_bytes - profile.baseline_bytes - profile.correction_bytes - profile.margin_bytes
        assert highest <= counted
        assert highest >= 0.9 * counted


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
@pytest.mark.parametrize("seed", range(6))
def test_passes_that_change_nothing_are_not_repeated(seed: int, settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five hundred are answered like each of them, and take no more than a few."""
    profile = random_profile(seed, regions=4)
    storages = tuple(replace(one, nbytes=one.nbytes * 40_000) for one in profile.storages)
    index = ProfileIndex(replace(profile, storages=storages))
    step = requests_of(index, [Decision("tape") if facts.slots else None for facts in index.facts])
    state = replace(STATE, settings=settings)
    asked = []
    ask = reserved._Repetition._ask
    monkeypatch.setattr(
        reserved._Repetition, "_ask", lambda self, requests: asked.append(requests) or ask(self, requests)
    )
    found = reserved_for(step, state, passes=500)
    assert len(asked) < 100
    monkeypatch.setattr(CachingAllocator, "layout", lambda self: None)
    assert reserved_for(step, state, passes=31 + seed) == found


def test_growing_segments_save_what_lies_in_between() -> None:
    profile = large_profile()
    plain = [None] * len(profile.regions)
    saved = saved_by_growing_segments(ProfileIndex(profile), plain)
    assert saved > 0
    growing = ProfileIndex(replace(profile, allocator=replace(STATE, settings="expandable_segments:True")))
    fixed_bytes = simulate_in_totals(ProfileIndex(profile), plain).reserved_bytes
    assert simulate_in_totals(growing, plain).reserved_bytes == fixed_bytes - saved
    assert saved_by_growing_segments(growing, plain) == 0
    assert saved_by_growing_segments(ProfileIndex(replace(profile, allocator=None)), plain) == 0


def step_of(*requests: Request, gradients: tuple[int, ...] = (), batch: tuple[int, ...] = ()) -> StepRequests:
    return StepRequests(held=(), batch=batch, gradients=gradients, states=(), forward_backward=Requests(requests))


def test_what_a_step_leaves_in_the_cache_is_what_the_next_one_finds() -> None:
    # The smaller block that is asked for first takes the larger segment that the last step left, from the second on.
    step = step_of(Request(1, 30 * MIB), Request(2, 40 * MIB), Request(1, 0), Request(2, 0))
    first = replace(STATE, beside_bytes=0)
    assert reserved_for(step, first).peak_bytes == 70 * MIB
    growing = step_of(
        Request(1, 30 * MIB), Request(1, 0), Request(2, 40 * MIB), Request(3, 30 * MIB), Request(2, 0), Request(3, 0)
    )
    assert reserved_for(growing, first).peak_bytes == 70 * MIB


def test_gradients_are_freed_after_each_step_or_kept() -> None:
    step = step_of(Request(1, 50 * MIB), Request(1, BECOMES_GRADIENT), gradients=(50 * MIB,))
    assert reserved_for(step, replace(STATE, beside_bytes=0)).peak_bytes == 100 * MIB


def test_what_a_larger_step_leaves_serves_a_smaller_one_and_not_the_other_way_round() -> None:
    state = replace(STATE, beside_bytes=0, outside_bytes=0)
    large = step_of(Request(1, 100 * MIB), Request(2, 80 * MIB), Request(1, 0), Request(2, 0), batch=(30 * MIB,))
    small = step_of(Request(1, 60 * MIB), Request(2, 50 * MIB), Request(1, 0), Request(2, 0), batch=(20 * MIB,))
    assert totals_in_turn([large], state) == 210 * MIB
    assert totals_in_turn([large, small], state) == 210 * MIB
    assert totals_in_turn([large, small, small], replace(state, outside_bytes=7)) == 210 * MIB + 7
    # 60, 50 and 20 MiB serve nothing of the large step but its batch.
    assert totals_in_turn([small, large], state) == (60 + 50 + 20 + 100 + 80) * MIB
    # Three things at a time, of which two find no place in what is there.
    many = step_of(*(Request(thing, 90 * MIB) for thing in range(3)), *(Request(thing, 0) for thing in range(3)))
    assert totals_in_turn([large, many], state) == (30 + 100 + 80 + 90 + 90) * MIB


def test_what_one_stream_frees_another_is_not_given() -> None:
    alone = replace(STATE, beside_bytes=0)
    asked = Request(1, 30 * MIB), Request(1, 0), Request(2, 30 * MIB, 1), Request(2, 0)
    assert reserved_for(step_of(*asked), alone).peak_bytes == 60 * MIB
    assert reserved_for(step_of(*asked[:2], Request(2, 30 * MIB), Request(2, 0)), alone).peak_bytes == 30 * MIB


def test_a_storage_is_asked_for_on_its_stream() -> None:
    profile = large_profile()
    elsewhere = tuple(replace(s, stream=1) if s.component == "activation" else s for s in profile.storages)
    plain = [None] * len(profile.regions)
    requests = requests_of(ProfileIndex(replace(profile, storages=elsewhere)), plain).forward_backward
    assert {request.stream for request in requests if request.nbytes > 0 and request.thing >= 0} == {1}


def test_what_a_sharded_step_reduces_becomes_its_gradients() -> None:
    """All gradients of a group are one storage, made on the collective's stream; freed where gradients are there."""
    profile = large_profile()
    gradients = [3 * MIB, MIB]
    reduced = len(profile.storages) + 2
    pieces = [Storage(nbytes=nbytes, component="gradients") for nbytes in gradients]
    storages = (*profile.storages, *pieces, Storage(nbytes=sum(gradients), stream=2))
    place = next(n for n, (kind, _) in enumerate(profile.events) if kind == EventKind.BACKWARD) + 1
    events = list(profile.events)
    events[place:place] = [Event(EventKind.ALLOC, reduced), Event(EventKind.FREE, reduced)]
    sharded = replace(profile, storages=storages, events=tuple(events), is_sharded=True)
    step = requests_of(ProfileIndex(sharded), [None] * len(profile.regions))
    assert step.given_gradients == tuple(gradients)
    assert step.gradients == (sum(gradients),)
    assert Request(reduced, BECOMES_GRADIENT) in step.forward_backward


def test_under_a_cap_a_step_flushes_the_cache_or_counts_without_one() -> None:
    step = step_of(Request(1, 60 * MIB), Request(1, 0), Request(2, 80 * MIB), Request(2, 0))
    alone = replace(STATE, beside_bytes=0)
    assert reserved_for(step, alone).peak_bytes == 140 * MIB
    assert reserved_for(step, replace(alone, cap_bytes=200 * MIB)) == reserved_for(step, alone)
    # From the second step on, the larger block serves both.
    capped = reserved_for(step, replace(alone, cap_bytes=100 * MIB))
    assert (capped.peak_bytes, capped.flushes) == (80 * MIB, 0)
    changing = step_of(
        Request(1, 60 * MIB), Request(2, 30 * MIB), Request(1, 0), Request(2, 0), Request(3, 85 * MIB), Request(3, 0)
    )
    capped = reserved_for(changing, replace(alone, cap_bytes=120 * MIB))
    assert capped.peak_bytes <= 120 * MIB < reserved_for(changing, alone).peak_bytes
    # Where memory would run out nevertheless, the cap is not counted on.
    impossible = reserved_for(step, replace(alone, cap_bytes=70 * MIB))
    assert impossible == reserved_for(step, alone)
