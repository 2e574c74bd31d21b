"""Regions that share an evaluation really have the same."""

from __future__ import annotations

import pytest

from tests.solver.profiles import chain_template, gpt_profile, profile_of, random_profile
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import region_curve
from tightfit.solver.columns import ColumnSource, keeping, useful_values


# In 10661, two regions of one class read storages of different sizes.
@pytest.mark.parametrize("seed", [10661, *range(60)])
def test_a_shared_column_is_the_region_s_own(seed: int) -> None:
    profile = random_profile(seed, regions=6)
    index = ProfileIndex(profile)
    source = ColumnSource(index)
    for region in range(len(profile.regions)):
        useful = useful_values(index, region)
        for decision in (keeping(index, ()), keeping(index, useful[:1]), keeping(index, useful[1:])):
            column = source.column(region, decision)
            curve = region_curve(index, region, decision)
            # All that the curve says, without any sharing: the level after each of its moments.
            moments = column.timeline.moments
            level = [sum(size for t, size in curve.deltas if t <= moment) for moment in moments[:-1]]
            held = {s: index.profile.storages[s].nbytes for s, _, _ in column.shared}
            shared = [sum(held[s] for s, first, end in curve.holds if s in held and first <= m < end) for m in moments]
            levels = [column.shape.level(rank) for rank in range(len(shared))]
            assert [a + b for a, b in zip(levels, shared, strict=True)][:-1] == level
            assert column.overhead_ms == curve.overhead_ms


@pytest.mark.parametrize("blocks", [8, 40])
def test_a_chain_has_few_patterns(blocks: int) -> None:
    index = ProfileIndex(gpt_profile(blocks))
    assert len({timeline.pattern for timeline in ColumnSource(index).timelines}) <= 8
    index = ProfileIndex(profile_of([chain_template(5)], [0] * blocks))
    assert len({timeline.pattern for timeline in ColumnSource(index).timelines}) <= 4
