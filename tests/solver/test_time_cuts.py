"""The solver where a device works beside the host: against brute force, and what it chooses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.solver.profiles import STREAM, OpSpec, Own, gpt_profile, profile_of, random_profile
from tests.solver.test_solver import all_decisions, check_plan
from tightfit.records import Decision, Profile
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver import column_generation
from tightfit.solver.columns import ColumnSource
from tightfit.solver.solver import Solver

#: Plans that brute force looks at, at most.
_MOST = 400


def on_device(profile: Profile, device_ms: Callable[[float], float], **fields: float) -> Profile:
    """Return the profile with a device's times, made of the host's."""
    signatures = tuple(replace(one, device_ms=device_ms(one.ms)) for one in profile.signatures)
    return replace(profile, signatures=signatures, **fields)  # type: ignore[arg-type]  # times


def random_on_device(seed: int) -> Profile:
    rng = random.Random(seed)
    pace = rng.choice((0.3, 1.0, 3.0))
    return on_device(
        random_profile(seed),
        lambda ms: ms * pace * rng.choice((0.2, 1.0, 3.0)),
        mode_ms_per_op=rng.random() / 2,
        tape_ms_per_op=rng.random() / 2,
        replay_ms_per_op=rng.random() / 2,
        accumulation_steps=rng.choice((1, 3)),
    )


def every_plan(index: ProfileIndex) -> list[list[Decision | None]]:
    plans: list[list[Decision | None]] = [[]]
    for region in range(len(index.profile.regions)):
        plans = [[*plan, decision] for plan in plans for decision in all_decisions(index, region)]
        if len(plans) > _MOST:
            return []
    return plans


SMALL = [seed for seed in range(60) if every_plan(ProfileIndex(random_profile(seed)))][:24]


def test_there_are_enough_small_profiles() -> None:
    assert len(SMALL) == 24


@pytest.mark.parametrize("seed", SMALL)
def test_ways_bound_the_walk_from_below_and_nearly_reach_it(seed: int) -> None:
    """What they leave out is a change from the host to the device in the midst of one recomputation."""
    profile = random_on_device(seed)
    index = ProfileIndex(profile)
    source = ColumnSource(index)
    for plan in random.Random(seed).sample(every_plan(index), k=min(20, len(every_plan(index)))):
        walked_ms = simulate(index, plan).step_ms - profile.plain_step_ms
        columns = [source.column(region, decision) for region, decision in enumerate(plan)]
        _, way_ms = source.longest_way([(column, 1) for column in columns])
        inside_ms = max((work.ms for column in columns for _, work in column.shape.work), default=0.0)
        assert -1e-9 <= way_ms <= walked_ms + 1e-9
        assert walked_ms <= way_ms + inside_ms + 1e-9


@pytest.mark.parametrize("enumerate_at_most", [column_generation.ENUMERATE_AT_MOST, 0])
@pytest.mark.parametrize("seed", SMALL[:12])
def test_plans_against_brute_force(seed: int, enumerate_at_most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is below every plan, and where all decisions are on offer the plan is the best."""
    monkeypatch.setattr(column_generation, "ENUMERATE_AT_MOST", enumerate_at_most)
    profile = random_on_device(seed)
    index = ProfileIndex(profile)
    walked = [simulate(index, plan) for plan in every_plan(index)]
    outcomes = [(one.peak_bytes, one.step_ms) for one in walked]
    solver = Solver(profile)
    peaks = sorted({peak for peak, _ in outcomes if peak >= solver.smallest_at_one_level().peak_bytes})
    for budget in {peaks[0], peaks[len(peaks) // 3], peaks[len(peaks) // 2], peaks[-1] - 1}:
        if budget < peaks[0]:
            continue
        plan = solver.solve(budget)
        best_ms = min(ms for peak, ms in outcomes if peak <= budget)
        assert plan.lower_bound_ms <= best_ms + 1e-6
        if enumerate_at_most and not plan.shared_tapes:
            assert plan.predicted_step_ms <= best_ms * 1.02
        check_plan(profile, plan)


@pytest.mark.parametrize("pace", [0.2, 1.0, 5.0])
def test_time_never_rises_with_the_budget_and_the_bound_is_near(pace: float) -> None:
    profile = on_device(
        gpt_profile(6), lambda ms: ms * pace, mode_ms_per_op=0.2, tape_ms_per_op=0.2, replay_ms_per_op=0.2
    )
    solver = Solver(profile)
    least, most = solver.minimum_budget()[0], solver.plain(0).plain_peak_bytes
    plans = [solver.solve(least + (most - least) * share // 3) for share in range(4)]
    times = [plan.predicted_step_ms for plan in plans]
    assert times == sorted(times, reverse=True)
    assert times[-1] == plans[-1].plain_step_ms
    for plan in plans:
        check_plan(profile, plan)
        if not plan.shared_tapes:  # at the smallest budget it is that far away on a processor, too
            assert plan.lower_bound_ms >= (0.85 if plan is plans[0] else 0.95) * plan.predicted_step_ms


def test_what_is_dropped_depends_on_who_is_behind() -> None:
    """As many bytes in one result of a slow kernel as in five of fast ones: few launches, or little work."""
    one = OpSpec(ms=1.01, reads=(STREAM,), makes=(40,), saves=(Own(0),))
    five = [OpSpec(ms=1.0, reads=(STREAM,), makes=(8,), saves=(Own(place + 1),)) for place in range(5)]
    profile = profile_of([(one, *five)], [0, 0, 0], tape_ms=0.5)
    profiles, plans = {}, {}
    for pace in (0.02, 5.0):
        profiles[pace] = on_device(profile, lambda ms, pace=pace: pace * (12.0 if ms == 1.01 else 1.0))
        solver = Solver(profiles[pace])
        plans[pace] = solver.solve(solver.plain(0).plain_peak_bytes - 2 * 40)
        check_plan(profiles[pace], plans[pace])
    for pace, other in ((0.02, 5.0), (5.0, 0.02)):
        of_other = simulate(ProfileIndex(profiles[pace]), plans[other].decisions)
        assert of_other.peak_bytes <= plans[pace].budget_bytes
        assert of_other.step_ms > plans[pace].predicted_step_ms + 1e-6
