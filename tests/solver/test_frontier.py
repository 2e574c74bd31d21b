"""The curve of time against budget."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tightfit
from tests.solver.profiles import STREAM, OpSpec, chain_template, gpt_profile, profile_of, random_profile
from tightfit.errors import BudgetInfeasible, UnsupportedInput
from tightfit.records import Plan, Profile
from tightfit.solver.frontier import frontier, frontier_of
from tightfit.solver.solver import Solver, minimum_budget, solve


def check_curve(profile: Profile, plans: list[Plan]) -> None:
    """What every curve promises."""
    least_bytes, _ = minimum_budget(profile)
    assert plans[0].budget_bytes == least_bytes
    assert plans[-1].budget_bytes == plans[-1].plain_peak_bytes
    assert plans[-1].is_plain
    assert plans[-1].predicted_step_ms == plans[-1].plain_step_ms
    for smaller, larger in pairwise(plans):
        assert smaller.budget_bytes < larger.budget_bytes
        assert smaller.predicted_step_ms >= larger.predicted_step_ms
    for plan in plans:
        assert plan.predicted_peak_bytes <= plan.budget_bytes
        assert plan.plain_step_ms <= plan.lower_bound_ms <= plan.predicted_step_ms + 1e-9
        plan.check()
    bounds = [plan.lower_bound_ms for plan in plans if not plan.shared_tapes]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(gpt_profile(3), id="gpt"),
        pytest.param(profile_of([chain_template(4)], [0] * 24), id="deep chain"),
    ],
)
def test_a_curve_falls_from_the_smallest_budget_to_the_plain_step(profile: Profile) -> None:
    plans = frontier(profile, points=8)
    check_curve(profile, plans)
    assert len(plans) in (8, 9)
    # The curve is one: it costs something at its beginning, and there is something between its ends.
    assert plans[0].predicted_step_ms > plans[-1].predicted_step_ms
    assert len({plan.predicted_step_ms for plan in plans}) > 2


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_random_steps_keep_the_promises(seed: int, points: int) -> None:
    profile = random_profile(seed)
    check_curve(profile, frontier(profile, points))


@pytest.mark.thorough
def test_budgets_are_evenly_spaced_and_one_level_is_among_them() -> None:
    profile = profile_of([chain_template(4)], [0] * 24)
    solver = Solver(profile)
    one_level_bytes = solver.smallest_at_one_level().peak_bytes
    plans = frontier(profile, points=5)
    budgets = [plan.budget_bytes for plan in plans]
    assert one_level_bytes in budgets
    assert budgets[0] < one_level_bytes, "this step goes below one level, or the test shows nothing"
    assert plans[0].shared_tapes
    even = [budget for budget in budgets if budget != one_level_bytes]
    assert len(even) == 5
    gaps = [right - left for left, right in pairwise(even)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.thorough
def test_no_point_is_slower_than_a_plan_solved_alone() -> None:
    profile = gpt_profile(2)
    for plan in frontier(profile, points=3):
        alone = solve(profile, plan.budget_bytes)
        assert plan.predicted_step_ms <= alone.predicted_step_ms + 1e-9


@pytest.mark.thorough
def test_other_budgets_join_the_curve_where_they_run() -> None:
    profile = gpt_profile(2)
    solver = Solver(profile)
    least_bytes, _ = solver.minimum_budget()
    plain_bytes = solver.plain(0).plain_peak_bytes
    own = [least_bytes - 1, (least_bytes + plain_bytes) // 2 + 12345, plain_bytes + 1]
    plans = frontier_of(solver, 3, also=own)
    budgets = [plan.budget_bytes for plan in plans]
    assert own[0] not in budgets
    assert set(own[1:]) <= set(budgets)
    assert budgets == sorted(budgets)
    assert plans[-1].is_plain
    assert all(left.predicted_step_ms >= right.predicted_step_ms for left, right in pairwise(plans))
    with pytest.raises(BudgetInfeasible):
        solve(profile, own[0])


def test_a_step_without_anything_to_drop_has_one_point() -> None:
    (only,) = frontier(profile_of([(OpSpec(ms=1.0, reads=(STREAM,), makes=(64,)),)], [0]))
    assert only.is_plain
    assert only.budget_bytes == only.plain_peak_bytes


@pytest.mark.parametrize("points", [1, 0, -3])
def test_fewer_than_two_points_are_refused(points: int) -> None:
    with pytest.raises(UnsupportedInput, match=rf"is {points}, but a curve needs its two ends.*Give at least 2"):
        frontier(gpt_profile(2), points)


def test_two_points_are_the_ends() -> None:
    profile = random_profile(3)
    plans = frontier(profile, 2)
    check_curve(profile, plans)
    assert len(plans) <= 3


def test_it_is_public() -> None:
    assert tightfit.frontier is frontier
