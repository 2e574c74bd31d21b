"""Recomputing modules as one more decision: chosen where it is faster, never where it is not, within the bound."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, combinations, product

import pytest

from tests.solver.profiles import STREAM, OpSpec, Own, gpt_profile, profile_of
from tightfit.records import Decision, Profile
from tightfit.simulation.levers.module import can_recompute_module
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver.columns import keeping, useful_values
from tightfit.solver.solver import Solver

MODULE = Decision("module")


def allowed(profile: Profile, *, per_op: float = 0.0, per_call: float = 0.0) -> Profile:
    """The profile with every region's module allowed to be recomputed, at this cost."""
    regions = tuple(replace(region, module_recomputable=True) for region in profile.regions)
    return replace(profile, regions=regions, module_ms_per_op=per_op, module_ms_per_call=per_call)


def blocks(count: int, seed: int = 0, *, ops: int = 3) -> Profile:
    draw = random.Random(seed)
    template = tuple(
        OpSpec(
            ms=draw.randint(1, 9),
            reads=(STREAM,) if place == 0 else (Own(place - 1),),
            makes=(draw.randint(1, 20) * 64,),
            saves=((STREAM,) if place == 0 else ()) + (Own(place),),
            workspace=draw.choice((0, 64, 640)),
        )
        for place in range(ops)
    )
    return profile_of([template], [0] * count, mode_ms=2.0, tape_ms=3.0)


def all_decisions(index: ProfileIndex, region: int) -> list[Decision | None]:
    useful = useful_values(index, region)
    sets = chain.from_iterable(combinations(useful, size) for size in range(len(useful) + 1))
    found: list[Decision | None] = [None, *(keeping(index, values) for values in sets)]
    return [*found, MODULE] if can_recompute_module(index, region) else found


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_the_best_of_all_and_not_below_the_bound(seed: int) -> None:
    profile = allowed(blocks(3, seed), per_op=1.0, per_call=2.0)
    index = ProfileIndex(profile)
    walked = [
        simulate(index, list(choice))
        for choice in product(*(all_decisions(index, region) for region in range(len(profile.regions))))
    ]
    solver = Solver(profile)
    lowest, highest = solver.smallest_at_one_level().peak_bytes, solver.plain(1 << 40).predicted_peak_bytes
    assert lowest == min(one.peak_bytes for one in walked)
    for share in (0.0, 0.2, 0.5, 0.8):
        budget_bytes = lowest + int(share * (highest - lowest))
        best_ms = min(one.step_ms for one in walked if one.peak_bytes <= budget_bytes)
        plan = solver.solve(budget_bytes)
        assert plan.predicted_step_ms == pytest.approx(best_ms)
        assert plan.lower_bound_ms <= best_ms + 1e-9


@pytest.mark.thorough
def test_it_is_chosen_where_it_costs_less_and_only_there() -> None:
    for per_call, expected in ((0.0, True), (1e6, False)):
        profile = replace(allowed(gpt_profile(4), per_call=per_call), tape_ms_per_op=0.5, mode_ms_per_op=0.5)
        index = ProfileIndex(profile)
        decisions = [MODULE if can_recompute_module(index, region) else None for region in range(len(profile.regions))]
        plan = Solver(profile).solve(simulate(index, decisions).peak_bytes)
        assert any(recipe.executor == "module" for recipe in plan.recipes) == expected


@pytest.mark.exhaustive
@pytest.mark.thorough
def test_the_bound_holds_for_large_classes() -> None:
    profile = replace(allowed(gpt_profile(6), per_op=0.1), tape_ms_per_op=0.5, mode_ms_per_op=0.5)
    without = replace(profile, regions=tuple(replace(region, module_recomputable=False) for region in profile.regions))
    solver, other = Solver(profile), Solver(without)
    lowest = solver.smallest_at_one_level().peak_bytes
    highest = solver.plain(1 << 40).predicted_peak_bytes
    for share in (0.0, 0.1, 0.3, 0.6, 0.9):
        budget_bytes = lowest + int(share * (highest - lowest))
        plan = solver.solve(budget_bytes)
        assert plan.lower_bound_ms <= plan.predicted_step_ms
        if budget_bytes >= other.smallest_at_one_level().peak_bytes:
            assert plan.predicted_step_ms <= other.solve(budget_bytes).predicted_step_ms + 1e-9


@pytest.mark.thorough
def test_a_lone_block_that_runs_again_keeps_the_bound_below_it() -> None:
    profile = replace(allowed(gpt_profile(1), per_op=0.01), tape_ms_per_op=5.0, mode_ms_per_op=5.0)
    solver = Solver(profile)
    lowest, highest = solver.smallest_at_one_level().peak_bytes, solver.plain(1 << 40).predicted_peak_bytes
    for share in (0.05, 0.3, 0.7):
        plan = solver.solve(lowest + int(share * (highest - lowest)))
        assert plan.lower_bound_ms <= plan.predicted_step_ms


def opaque(profile: Profile, places: tuple[int, ...]) -> Profile:
    """The profile with these operations of each region beyond any tape."""
    first = {region.first_op for region in profile.regions}
    wanted = {start + place for start in first for place in places}
    ops = tuple(replace(op, keep_reason="opaque") if i in wanted else op for i, op in enumerate(profile.ops))
    return replace(profile, ops=ops)


def test_what_is_written_later_forbids_it() -> None:
    plain = allowed(blocks(2))
    assert all(can_recompute_module(ProfileIndex(plain), region) for region in range(2))
    written = plain.ops[0].inputs[0]
    values = tuple(replace(v, overwritten=True) if i == written else v for i, v in enumerate(plain.values))
    assert not can_recompute_module(ProfileIndex(replace(plain, values=values)), 0)


@pytest.mark.parametrize("places", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_a_second_call_drops_what_no_tape_can(seed: int, places: tuple[int, ...]) -> None:
    profile = allowed(opaque(blocks(3, seed), places), per_op=1.0, per_call=2.0)
    index = ProfileIndex(profile)
    assert all(facts.only_again for facts in index.facts if facts.own)
    walked = [
        simulate(index, list(choice))
        for choice in product(*(all_decisions(index, region) for region in range(len(profile.regions))))
    ]
    solver = Solver(profile)
    lowest, highest = solver.smallest_at_one_level().peak_bytes, solver.plain(1 << 40).predicted_peak_bytes
    assert lowest == min(one.peak_bytes for one in walked)
    without = Solver(replace(profile, regions=tuple(replace(r, module_recomputable=False) for r in profile.regions)))
    assert lowest < without.smallest_at_one_level().peak_bytes
    for budget in range(lowest, highest + 1, max(1, (highest - lowest) // 5)):
        plan = solver.solve(budget)
        best = min(one.step_ms for one in walked if one.peak_bytes <= budget)
        assert plan.predicted_peak_bytes <= budget
        assert plan.lower_bound_ms <= best + 1e-9
        assert plan.predicted_step_ms == pytest.approx(best)


def test_the_full_plan_drops_what_no_tape_can() -> None:
    profile = allowed(opaque(blocks(3), (1,)))
    plan = Solver(profile).full(0)
    assert {recipe.lever for recipe in plan.recipes} == {"module"}
    assert plan.predicted_peak_bytes < Solver(profile).plain(0).predicted_peak_bytes
