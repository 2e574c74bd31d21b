"""The levers' interface: what is registered is offered, evaluated and planned by, whatever it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from tests.solver.profiles import gpt_profile, random_profile
from tightfit.errors import PlanMismatch
from tightfit.records import Action, Decision, EventKind, Recipe, Stretch
from tightfit.simulation import levers
from tightfit.simulation.levers import (
    BY_VALUE,
    LEVERS,
    NOTHING,
    Lever,
    Moment,
    RegionModel,
    UntouchedModel,
    lever_named,
)
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import region_curve, simulate
from tightfit.solver import column_generation
from tightfit.solver.solver import Solver


class _Vanishing:
    """Holds nothing of what may be dropped, and recomputes nothing."""

    slots: frozenset[int]

    def __init__(self, index: ProfileIndex, region: int, cost_ms: float) -> None:
        self.slots = frozenset(index.facts[region].slots)
        self.replayed_ops: list[int] = []
        self._cost_ms = cost_ms

    def handle(self, kind: EventKind, a: int) -> Moment:
        return Moment(added=Stretch.of(self._cost_ms)) if kind == EventKind.EXIT else NOTHING


class VanishingLever:
    """What a perfect lever would be: memory for a fixed price."""

    name = "vanishing"
    executor = "tape"

    def __init__(self, cost_ms: float) -> None:
        self._cost_ms = cost_ms

    def offers(self, index: ProfileIndex, regions: Sequence[int]) -> Iterable[Decision]:
        return [Decision(self.name)] if any(index.facts[region].slots for region in regions) else []

    def model(self, index: ProfileIndex, region: int, decision: Decision) -> RegionModel:
        return _Vanishing(index, region, self._cost_ms)

    def recipe(self, index: ProfileIndex, region: int, decision: Decision) -> Recipe:
        return Recipe(
            class_id=index.profile.regions[region].class_id, op_names=(), lever=self.name, executor=self.executor,
            keep=(), drop=(), replay=(), held_bytes=0, dropped_bytes=0, replay_ms=0.0,
        )  # fmt: skip


@pytest.fixture
def vanishing(monkeypatch: pytest.MonkeyPatch) -> Lever:
    lever = VanishingLever(cost_ms=0.125)
    for module in (levers, column_generation):
        monkeypatch.setattr(module, "LEVERS", (*LEVERS, lever))
    return lever


def test_a_value_that_is_neither_kept_nor_offloaded_is_recomputed() -> None:
    decision = Decision("tape", kept=frozenset({(0, 0)}), offloaded=frozenset({(1, 0)}))
    assert [decision.action((place, 0)) for place in range(3)] == [Action.KEEP, Action.OFFLOAD, Action.RECOMPUTE]


def test_a_lever_that_does_not_exist_is_told() -> None:
    with pytest.raises(PlanMismatch, match=r"a lever 'wishing', .*Solve again"):
        lever_named("wishing")


@pytest.mark.parametrize("seed", range(8))
def test_a_region_without_decision_holds_what_a_tape_that_keeps_everything_holds(seed: int) -> None:
    index = ProfileIndex(random_profile(seed))
    for region, facts in enumerate(index.facts):
        everything = BY_VALUE.decide([index.local(value) for value in facts.optional])
        assert region_curve(index, region, None) == region_curve(index, region, everything)


def test_the_solver_chooses_what_a_new_lever_offers(vanishing: Lever) -> None:
    profile = gpt_profile(4)
    index = ProfileIndex(profile)
    solver = Solver(profile)
    smallest = simulate(index, [Decision(vanishing.name) if facts.slots else None for facts in index.facts])
    assert solver.smallest_at_one_level().peak_bytes == smallest.peak_bytes
    plan = solver.solve(smallest.peak_bytes)
    chosen = [recipe.lever for recipe in plan.recipes]
    assert set(chosen) == {vanishing.name}
    assert plan.predicted_peak_bytes == smallest.peak_bytes
    added_ms = plan.predicted_step_ms - plan.plain_step_ms
    assert added_ms == pytest.approx(0.125 * sum(region.recipe >= 0 for region in plan.regions))
    assert plan.plain_step_ms <= plan.lower_bound_ms <= plan.predicted_step_ms
    assert simulate(index, plan.decisions).peak_bytes == plan.predicted_peak_bytes


def test_untouched_regions_recompute_nothing() -> None:
    index = ProfileIndex(gpt_profile(1))
    model = UntouchedModel(index, 1)
    assert model.replayed_ops == []
    assert model.handle(EventKind.EXIT, 1) is NOTHING
