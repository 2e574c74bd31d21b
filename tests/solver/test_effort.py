"""A search cut short still gives a plan that keeps its budget, with an honest bound, and always the same one."""

from __future__ import annotations

import sys

import pytest

from tests.solver.profiles import gpt_profile, random_profile
from tests.solver.test_solver import check_plan
from tightfit.records import Plan, Profile
from tightfit.solver.effort import Effort
from tightfit.solver.solver import Solver


def without_enumeration(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys.modules["tightfit.solver.column_generation"], "ENUMERATE_AT_MOST", 0)


def plans_of(profile: Profile) -> list[Plan]:
    solver = Solver(profile)
    least, plain = solver.minimum_budget()[0], solver.plain(0).plain_peak_bytes
    return [solver.solve(least + (plain - least) * part // 4) for part in range(4)]


@pytest.mark.parametrize("profile", [gpt_profile(3), random_profile(5), random_profile(8)])
def test_with_no_work_at_all_plans_hold_and_bounds_are_true(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    without_enumeration(monkeypatch)
    best = plans_of(profile)
    monkeypatch.setattr("tightfit.solver.column_generation.SEARCH_WORK", 0)
    monkeypatch.setattr("tightfit.solver.solver.SOLVE_WORK", 0)
    hasty = plans_of(profile)
    for plan in hasty:
        check_plan(profile, plan)
        allowed = [one for one in best if one.budget_bytes <= plan.budget_bytes]
        assert all(plan.shared_tapes or plan.lower_bound_ms <= one.predicted_step_ms + 1e-6 for one in allowed)
    assert plans_of(profile) == hasty


def test_a_part_leaves_the_rest_to_others() -> None:
    effort = Effort(100)
    with effort.part(0.25):
        effort.spend(24)
        assert not effort.is_spent
        effort.spend(1)
        assert effort.is_spent
    assert not effort.is_spent
    with effort.part(1.0):
        effort.spend(75)
    assert effort.is_spent


def test_the_last_resort_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    without_enumeration(monkeypatch)
    monkeypatch.setattr("tightfit.solver.effort._LAST_RESORT_S", 0.0)
    profile = gpt_profile(2)
    for plan in plans_of(profile):
        check_plan(profile, plan)
    assert "solving was cut off after 0 seconds" in caplog.text
