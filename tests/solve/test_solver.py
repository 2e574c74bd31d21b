"""The solver against brute force, and the promises of its plans."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain, combinations, product
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recollect.errors import BudgetInfeasible
from recollect.records import Decision, Plan, Profile
from recollect.simulate import ProfileIndex, simulate
from recollect.solve import Solver, full_plan, minimum_budget, plain_plan, solve
from tests.solve.profiles import (
    SHARED,
    STREAM,
    OpSpec,
    Own,
    chain_template,
    gpt_profile,
    profile_of,
    random_profile,
)

MIB = 1 << 20


def all_decisions(index: ProfileIndex, region: int) -> list[Decision]:
    """Untouched, and every keep set."""
    names = sorted(index.local(value) for value in index.facts[region].optional)
    sets = chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))
    return [None, *(frozenset(keep) for keep in sets)]


def brute_force(index: ProfileIndex, most: int) -> list[tuple[int, float]]:
    """(peak, time) of every plan there is; too many plans are not an example."""
    choices = [all_decisions(index, region) for region in range(len(index.profile.regions))]
    count = 1
    for options in choices:
        count *= len(options)
    assume(count <= most)
    results = [simulate(index, plan) for plan in product(*choices)]
    return [(result.peak_bytes, result.step_ms) for result in results]


def check_plan(profile: Profile, plan: Plan) -> None:
    index = ProfileIndex(profile)
    decisions: list[Decision] = [
        None if region.recipe < 0 else frozenset(plan.recipes[region.recipe].keep) for region in plan.regions
    ]
    again = simulate(index, decisions)
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
    assert solver.minimum_budget()[0] == required
    peaks = sorted({peak for peak, _ in outcomes})
    for budget in {peaks[0], peaks[len(peaks) // 3], peaks[len(peaks) // 2], peaks[-1], peaks[-1] - 1}:
        if budget < required:
            continue
        plan = solver.solve(budget)
        best = min(ms for peak, ms in outcomes if peak <= budget)
        assert plan.predicted_step_ms == pytest.approx(best, abs=1e-6)
        assert plan.lower_bound_ms <= best + 1e-6
        check_plan(profile, plan)
    with pytest.raises(BudgetInfeasible) as caught:
        solver.solve(required - 1)
    assert (caught.value.required_bytes, caught.value.budget_bytes) == (required, required - 1)
    assert caught.value.where
