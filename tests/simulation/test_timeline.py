"""The timeline of a step: its peak is the simulator's, its parts add up, and thinning loses no peak."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulation.test_simulator import random_plan
from tests.solver.profiles import chain_template, profile_of, random_profile
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.simulation.timeline import PARTS, memory_timeline


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), columns=st.sampled_from([1, 7, 10**6]))
def test_its_peak_and_its_end_are_the_simulated_ones(seed: int, columns: int) -> None:
    rng = random.Random(seed)
    profile = random_profile(seed)
    index = ProfileIndex(profile)
    for decisions in ([None] * len(profile.regions), random_plan(index, rng)):
        walked = simulate(index, decisions)
        found = memory_timeline(profile, decisions, index=index, columns=columns)
        assert found.peak_bytes == walked.peak_bytes
        assert tuple(found.parts) == PARTS
        totals = [sum(held) for held in zip(*found.parts.values(), strict=True)]
        assert len(totals) == len(found.ms) <= columns
        assert max(totals) == totals[found.peak_column] == walked.peak_bytes
        assert list(found.ms) == sorted(set(found.ms))
        if profile.accumulation_steps == 1 and not profile.has_device_times:
            assert abs(found.end_ms - walked.step_ms) <= 1e-9 * walked.step_ms


def test_recomputation_is_told_from_what_is_kept() -> None:
    profile = profile_of([chain_template(5)], [0, 0, 0, 0])
    index = ProfileIndex(profile)
    plain = memory_timeline(profile, [None] * 4)
    assert not any(plain.parts["recomputed"])
    assert plain.backward_ms is not None
    before = [held for ms, held in zip(plain.ms, plain.parts["activations"], strict=True) if ms < plain.backward_ms]
    assert before == sorted(before)  # forward only piles up
    decisions = [BY_VALUE.decide(()) if facts.slots else None for facts in index.facts]
    planned = memory_timeline(profile, decisions)
    assert max(planned.parts["activations"]) < max(plain.parts["activations"])
    assert max(planned.parts["recomputed"]) > 0
    assert planned.end_ms > plain.end_ms
