"""The program of one region against all its keep sets."""

from __future__ import annotations

import random
from itertools import chain, combinations

import pytest

from tests.solver.profiles import STREAM, OpSpec, Own, profile_of, random_profile
from tightfit.records import Decision, Profile
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver import column_generation as generate
from tightfit.solver.column_generation import ColumnPool
from tightfit.solver.columns import ColumnSource, keeping
from tightfit.solver.effort import SOLVE_WORK, Effort
from tightfit.solver.pricing import Prices, PricingModel
from tightfit.solver.region_mip import RegionProgram
from tightfit.solver.solver import Solver


def all_decisions(index: ProfileIndex, region: int) -> list[Decision | None]:
    values = sorted(index.facts[region].optional)
    sets = chain.from_iterable(combinations(values, size) for size in range(len(values) + 1))
    return [None, *(keeping(index, kept) for kept in sets)]


@pytest.mark.thorough
def test_at_prices_it_is_a_bound_and_mostly_the_least_cost() -> None:
    tight = looser_cut = cases = 0
    for seed in range(120):
        index = ProfileIndex(random_profile(seed, regions=3))
        source = ColumnSource(index)
        shared = frozenset(storage for storage, regions in source.holders.items() if len(regions) > 1)
        pool = ColumnPool(source, ColumnPool(ColumnSource(ProfileIndex(index.profile.with_unit_times()))))
        rng = random.Random(seed)
        for region, facts in enumerate(index.facts):
            exact = RegionProgram(index, region, shared)
            if not exact.usable or len(facts.optional) > 7:
                continue
            times = rng.sample(range(len(index.profile.events)), 3)
            private = {time: rng.choice((0.005, 0.02, 0.1)) for time in times}
            parts = {(time, storage, region): private[time] * rng.random() for time in times for storage in shared}
            prices = Prices(times={source.cuts.first[0]: 1.0}, private=private, shared=parts)
            least = min(pool.cost(source.column(region, d), prices) for d in all_decisions(index, region))
            bound, decision = exact.bound(prices, Effort(SOLVE_WORK))
            cut, _ = PricingModel(index, region, shared).best(prices)
            assert bound <= least + 1e-6
            assert bound >= cut - 1e-6
            cases += 1
            looser_cut += cut < least - 1e-6
            if bound > least - 1e-6:
                tight += 1
                assert pool.cost(source.column(region, decision), prices) == pytest.approx(least)
    assert cases > 100
    assert looser_cut > 5  # else this shows nothing
    assert tight > 0.95 * cases


def knapsack_profile(seed: int) -> Profile:
    """One region of independent operations: a keep set is any subset, and few are on the hull of time and bytes."""
    rng = random.Random(seed)
    template = tuple(
        OpSpec(ms=rng.uniform(1.0, 4.0), reads=(STREAM,), makes=(64 * rng.randint(2, 9),), saves=(Own(place),))
        for place in range(8)
    )
    return profile_of([template], [0])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "profile", [*map(knapsack_profile, range(4)), *(random_profile(s, regions=1) for s in range(12))]
)
def test_a_lone_region_gets_its_best_decision(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its keep sets are not enumerated, at any budget, and the bound says so."""
    monkeypatch.setattr(generate, "ENUMERATE_AT_MOST", 0)
    solver = Solver(profile)
    if len(solver.index.facts[0].optional) > 9:
        pytest.skip("too many keep sets to try them all")
    known = [simulate(solver.index, [decision]) for decision in all_decisions(solver.index, 0)]
    smallest = solver.smallest_at_one_level().peak_bytes
    for budget in range(smallest, max(result.peak_bytes for result in known), 48):
        plan = solver.solve(budget)
        best = min(result.step_ms for result in known if result.peak_bytes <= budget)
        assert plan.predicted_step_ms <= best + 1e-9
        assert plan.lower_bound_ms == pytest.approx(plan.predicted_step_ms)
