"""The family of recursive plans is walked only as far as somebody asks, and that says the same as walking all of it."""

from __future__ import annotations

import pytest

from tests.solver.profiles import gpt_profile, random_profile
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.recursive import RecursivePlan, RecursivePlans

_ALL = float("inf")


def _peaks(plans: list[RecursivePlan]) -> list[int]:
    return [plan.simulation.peak_bytes for plan in plans]


@pytest.mark.parametrize("seed", range(40))
def test_candidates_are_found_without_walking_all(seed: int) -> None:
    index = ProfileIndex(random_profile(seed, regions=6))
    everything = RecursivePlans(index).within(_ALL)
    if not everything:
        return
    least = min(_peaks(everything))
    few = RecursivePlans(index)
    found = few.smallest(_ALL)
    assert found is not None
    first = everything[_peaks(everything).index(least)]
    assert (found.decisions, found.shared_tapes) == (first.decisions, first.shared_tapes)
    assert RecursivePlans(index).smallest(least - 1) is None
    for budget in sorted({*_peaks(everything), least - 1}):
        expected = [plan.simulation for plan in everything if plan.simulation.peak_bytes <= budget]
        assert [plan.simulation for plan in few.within(budget)] == expected
        assert [plan.simulation for plan in RecursivePlans(index).within(budget)] == expected


def test_candidates_that_add_less_are_left_out() -> None:
    index = ProfileIndex(gpt_profile(6))
    steps = [plan.simulation.step_ms for plan in RecursivePlans(index).within(_ALL)]
    limit = sorted(steps)[len(steps) // 2]
    left = RecursivePlans(index, limit).within(_ALL)
    assert [plan.simulation.step_ms for plan in left] == [step for step in steps if step >= limit]
