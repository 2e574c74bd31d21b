"""What is found quickly about a region is what its model says, event by event."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.solver.profiles import gpt_profile, random_profile
from tightfit.records import Profile
from tightfit.simulation.levers import BY_VALUE, NOTHING, Moment
from tightfit.simulation.levers.tape_model import TapeModel
from tightfit.simulation.levers.tape_script import script_of
from tightfit.simulation.profile_index import ProfileIndex


def with_random_operations(profile: Profile, rng: random.Random) -> Profile:
    ops = tuple(replace(op, random_state_bytes=rng.choice((0, 0, 16))) for op in profile.ops)
    return replace(profile, ops=ops, replay_ms_per_op=0.25, tape_ms_per_op=0.5, region_ms_per_call=0.125)


@pytest.mark.parametrize("seed", range(60))
def test_the_script_says_what_the_model_says(seed: int) -> None:
    rng = random.Random(seed)
    index = ProfileIndex(with_random_operations(random_profile(seed) if seed % 4 else gpt_profile(2), rng))
    for region, facts in enumerate(index.facts):
        script = script_of(index, region)
        assert script is not None
        for _ in range(6):
            share = rng.random()
            decision = BY_VALUE.decide([index.local(value) for value in facts.optional if rng.random() < share])
            model = TapeModel(index, region, [decision])
            said = []
            for time in index.events_of_region[region]:
                moment = model.handle(*index.profile.events[time])
                if moment is not NOTHING and moment != Moment():
                    said.append((time, moment))
            found, replayed = script.play(decision.kept)
            assert [(time, moment) for time, moment in found if moment != Moment()] == said
            assert replayed == model.replayed_ops


def test_a_graph_that_is_kept_is_left_to_the_model() -> None:
    index = ProfileIndex(random_profile(3).with_kept_graph())
    assert script_of(index, 0) is None
    decision = BY_VALUE.decide(())
    assert BY_VALUE.happenings(index, 0, decision) is None
