"""The solver against brute force, and the promises of its plans."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from itertools import chain, combinations, product
from operator import le
from pathlib import Path

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tests.solver.profiles import (
    SHARED,
    STREAM,
    WEIGHT,
    OpSpec,
    Own,
    chain_template,
    gpt_profile,
    profile_of,
    random_profile,
)
from tightfit.errors import BudgetInfeasible
from tightfit.records import Decision, Plan, Profile
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver.solver import Solver, full_plan, minimum_budget, plain_plan, solve

MIB = 1 << 20


def all_decisions(index: ProfileIndex, region: int) -> list[Decision | None]:
    """Untouched, and every choice of kept values."""
    names = sorted(index.local(value) for value in index.facts[region].optional)
    sets = chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))
    return [None, *(BY_VALUE.decide(kept) for kept in sets)]


def brute_force(index: ProfileIndex, most: int) -> list[tuple[int, float]]:
    """(peak, time) of every plan there is; too many plans are not an example."""
    choices = [all_decisions(index, region) for region in range(len(index.profile.regions))]
    count = 1
    for options in choices:
        count *= len(options)
    if count > most:
        reject()
    results = [simulate(index, plan) for plan in product(*choices)]
    return [(result.peak_bytes, result.step_ms) for result in results]


def check_plan(profile: Profile, plan: Plan) -> None:
    index = ProfileIndex(profile)
    again = simulate(index, plan.decisions, plan.shared_tapes)
    assert again.peak_bytes == plan.predicted_peak_bytes <= plan.budget_bytes
    assert again.step_ms == pytest.approx(plan.predicted_step_ms, abs=1e-8)
    assert sum(plan.breakdown.values()) == plan.predicted_peak_bytes
    assert plan.plain_step_ms <= plan.lower_bound_ms <= plan.predicted_step_ms
    assert plan.overhead_ratio == pytest.approx(plan.predicted_step_ms / plan.plain_step_ms - 1)
    plan.check()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_optimal_against_brute_force(seed: int) -> None:
    profile = random_profile(seed)
    index = ProfileIndex(profile)
    outcomes = brute_force(index, 1500)
    solver = Solver(profile)
    required = min(peak for peak, _ in outcomes)
    assert solver.smallest_at_one_level().peak_bytes == required
    peaks = sorted({peak for peak, _ in outcomes})
    for budget in {peaks[0], peaks[len(peaks) // 3], peaks[len(peaks) // 2], peaks[-1], peaks[-1] - 1}:
        if budget < required:
            continue
        plan = solver.solve(budget)
        best = min(ms for peak, ms in outcomes if peak <= budget)
        if plan.shared_tapes:  # below one level there may be something faster than the best at one level
            assert plan.predicted_step_ms < best
        else:
            assert plan.predicted_step_ms == pytest.approx(best, abs=1e-6)
        assert plan.lower_bound_ms <= best + 1e-6
        check_plan(profile, plan)
    required = solver.minimum_budget()[0]
    check_plan(profile, solver.solve(required))
    with pytest.raises(BudgetInfeasible) as caught:
        solver.solve(required - 1)
    assert (caught.value.required_bytes, caught.value.budget_bytes) == (required, required - 1)
    assert caught.value.where


@pytest.mark.thorough
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_bound_and_feasibility_without_enumeration(seed: int) -> None:
    """As for large regions: columns by pricing only. Plans hold, and the bound is below the true optimum."""
    profile = random_profile(seed)
    index = ProfileIndex(profile)
    outcomes = brute_force(index, 600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tightfit.solver.column_generation"], "ENUMERATE_AT_MOST", 0)
        solver = Solver(profile)
        required = solver.smallest_at_one_level().peak_bytes
        assert required >= min(peak for peak, _ in outcomes)
        peaks = sorted({peak for peak, _ in outcomes if peak >= required})
        for budget in {required, peaks[len(peaks) // 2], peaks[-1]}:
            plan = solver.solve(budget)
            best = min(ms for peak, ms in outcomes if peak <= budget)
            assert plan.lower_bound_ms <= best + 1e-6 <= plan.predicted_step_ms + 2e-6
            check_plan(profile, plan)


@pytest.mark.thorough
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_time_never_increases_with_the_budget(seed: int) -> None:
    profile = random_profile(seed, regions=5)
    shared = Solver(profile)
    required = shared.minimum_budget()[0]
    most = shared.plain(0).predicted_peak_bytes
    budgets = [required + (most - required) * step // 5 for step in range(6)]
    alone = [solve(profile, budget).predicted_step_ms for budget in budgets]
    assert alone == sorted(alone, reverse=True)
    downwards = [shared.solve(budget).predicted_step_ms for budget in reversed(budgets)]
    assert downwards[::-1] == pytest.approx(alone, abs=1e-6)


def test_a_chain_by_hand() -> None:
    """Three operations of 1, 2 and 3 ms, 64 bytes each, all saved; baseline 144, gradients 8 bytes each."""
    profile = profile_of([chain_template(3)], [0])
    plain = plain_plan(profile, 10**6)
    assert plain.predicted_peak_bytes == 144 + 3 * 64 + 2 * 8 == plain.plain_peak_bytes
    assert plain.is_plain
    assert plain.recipes == ()
    # Dropping all gains nothing: the first read replays the whole chain, which stays memoised.
    full = full_plan(profile, 10**6)
    assert full.predicted_peak_bytes == plain.predicted_peak_bytes
    assert full.predicted_step_ms == plain.predicted_step_ms + 1 + 2 + 3
    assert full.recipes[0].replay == (0, 1, 2)
    assert full.recipes[0].drop == ((0, 0), (1, 0), (2, 0))
    assert (full.recipes[0].held_bytes, full.recipes[0].dropped_bytes) == (0, 192)
    # Holding the last two and replaying the first, once they are gone, is the least peak and costs 1 ms.
    required, where = minimum_budget(profile)
    assert (required, where) == (144 + 2 * 64 + 2 * 8, "backward of layers.0#0")
    for budget in (required, plain.predicted_peak_bytes - 1):
        plan = solve(profile, budget)
        assert plan.predicted_peak_bytes == required
        assert plan.predicted_step_ms == plain.predicted_step_ms + 1
        assert plan.recipes[0].keep == ((1, 0), (2, 0))
        assert plan.recipes[0].drop == ((0, 0),)
        assert plan.recipes[0].replay == (0,)
        assert (plan.recipes[0].held_bytes, plan.recipes[0].dropped_bytes) == (128, 64)
    with pytest.raises(BudgetInfeasible) as caught:
        solve(profile, required - 1)
    assert caught.value.required_bytes == required


def test_values_kept_for_safety_are_listed() -> None:
    template = (
        OpSpec(reads=(STREAM,), makes=(64,), saves=(Own(0),), keep_reason="randomness not recorded"),
        OpSpec(reads=(Own(0),), makes=(32,), saves=(Own(1),)),
        OpSpec(reads=(Own(1),), mutates=(Own(1),)),
        OpSpec(reads=(Own(0),), makes=(24,), saves=(Own(3),)),
    )
    plan = full_plan(profile_of([template, template], [0, 0]), 10**6)
    (recipe, *_) = plan.recipes
    assert {(kept.reason, kept.nbytes) for kept in recipe.kept_for_safety} == {
        ("randomness not recorded", 64),
        ("overwritten later", 32),
    }
    assert recipe.drop == ((3, 0),)
    assert recipe.held_bytes == 64 + 32


@pytest.mark.thorough
def test_an_ample_budget_touches_nothing() -> None:
    profile = gpt_profile(3)
    peak = plain_plan(profile, 0).predicted_peak_bytes
    plan = solve(profile, peak)
    assert plan.is_plain
    assert plan.predicted_step_ms == plan.plain_step_ms == plan.lower_bound_ms
    assert not solve(profile, peak - 1).is_plain


def test_nothing_to_drop() -> None:
    template = (OpSpec(reads=(STREAM,), makes=(64,), saves=(Own(0),), keep_reason="unknown kernel"),)
    profile = profile_of([template], [0, 0])
    peak = plain_plan(profile, 0).predicted_peak_bytes
    assert minimum_budget(profile)[0] == peak
    assert solve(profile, peak).is_plain
    assert full_plan(profile, peak).is_plain
    with pytest.raises(BudgetInfeasible):
        solve(profile, peak - 1)


def test_equal_times_prefer_untouched() -> None:
    """Operations that take no time: only the memory decides, and what needs no dropping is left alone."""
    template = tuple(
        OpSpec(ms=0.0, reads=(Own(place - 1) if place else STREAM,), makes=(64,), saves=(Own(place),))
        for place in range(3)
    )
    profile = profile_of([template], [0, 0, 0])
    peak = plain_plan(profile, 0).predicted_peak_bytes
    plan = solve(profile, peak - 1)
    assert sum(region.recipe >= 0 for region in plan.regions) == 1


def test_a_source_that_two_regions_hold_counts_once() -> None:
    """Both regions drop and hold the first region's value as their source: one storage, not two."""
    first = (OpSpec(reads=(WEIGHT,), makes=(512,), saves=()),)
    reader = (OpSpec(reads=(SHARED,), makes=(600,), saves=(Own(0),)),)
    profile = profile_of([first, reader], [0, 1, 1, 1])
    index = ProfileIndex(profile)
    outcomes = brute_force(index, 100)
    solver = Solver(profile)
    assert solver.minimum_budget()[0] == min(peak for peak, _ in outcomes)
    plan = solver.solve(solver.minimum_budget()[0])
    assert plan.predicted_step_ms == pytest.approx(
        min(ms for peak, ms in outcomes if peak <= plan.budget_bytes), abs=1e-6
    )
    check_plan(profile, plan)


@pytest.mark.thorough
def test_gpt_blocks_stay_close_to_the_bound() -> None:
    profile = gpt_profile(6)
    solver = Solver(profile)
    least, most = solver.minimum_budget()[0], plain_plan(profile, 0).predicted_peak_bytes
    assert least < solver.full(0).predicted_peak_bytes < most
    times = []
    for share in (0.0, 0.2, 0.5):
        plan = solver.solve(least + int((most - least) * share))
        check_plan(profile, plan)
        times.append(plan.predicted_step_ms)
        assert len(plan.recipes) < len(plan.regions)
    assert times == sorted(times, reverse=True)
    assert plan.predicted_step_ms <= plan.lower_bound_ms * 1.01
    assert plan.overhead_ratio < 0.05  # half the memory for a few percent


@pytest.mark.thorough
def test_solving_is_deterministic() -> None:
    profile = gpt_profile(3)
    budget = plain_plan(profile, 0).predicted_peak_bytes * 6 // 10
    assert solve(profile, budget) == solve(profile, budget)


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    profile = profile_of([chain_template(3)], [0, 0])
    solve(profile, minimum_budget(profile)[0])
    assert capfd.readouterr() == ("", "")


@pytest.mark.thorough
def test_passes_with_torch_blocked() -> None:
    """Some of what `make test-fast` runs: reading, simulating and solving need no PyTorch."""
    tests = Path(__file__).parents[1]
    words = ["-q", "-p", "no:cacheprovider", "-p", "tests.support.without_torch", "-k", "hand or ample or ends"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *(str(tests / room) for room in ("records", "simulation", "solver"))],
        capture_output=True, text=True, timeout=600, cwd=tests.parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.thorough
def test_the_smallest_budget_does_not_depend_on_measured_times() -> None:
    """What one run names as the smallest budget, the next run must accept, whatever its clock said."""
    profile = gpt_profile(3, width=64, tokens=16)
    rng = random.Random(1)
    found = set()
    for _ in range(5):
        noisy = tuple(replace(signature, ms=signature.ms * rng.uniform(0.05, 20)) for signature in profile.signatures)
        found.add(minimum_budget(replace(profile, signatures=noisy)))
    assert len(found) == 1


@pytest.mark.thorough
@pytest.mark.slow
def test_what_lies_between_points_of_the_hull_is_on_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks: mixtures of what is on the hull do not come near every budget. No plan gets slower by it."""
    profile = gpt_profile(4)
    budgets = [budget_at(profile, share) for share in (0.75,)]
    found = [Solver(profile).solve(budget).predicted_step_ms for budget in budgets]
    monkeypatch.setattr(sys.modules["tightfit.solver.column_generation"], "_BETWEEN_AT_MOST", 0)
    on_hull = [Solver(profile).solve(budget).predicted_step_ms for budget in budgets]
    assert all(map(le, found, on_hull))
    assert sum(found) < sum(on_hull)


def budget_at(profile: Profile, share: float) -> int:
    """A budget between the smallest and the plain peak."""
    least_bytes, plain_bytes = minimum_budget(profile)[0], plain_plan(profile, 0).predicted_peak_bytes
    return least_bytes + int((plain_bytes - least_bytes) * share)
