"""A plan survives other batch shapes, whoever tells of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.planning.shape_case import LONG, MIDDLE, SHORT, Case, adamw
from tests.replay.helpers import differences
from tests.support.shape_models import Block, Tensor, Transformer, batch_of, gradients, next_word_loss, peak_of
from tightfit import BudgetInfeasible
from tightfit.errors import PromiseWarning
from tightfit.installation.plans import PlanStatistics
from tightfit.installation.region_forward import RegionForward
from tightfit.planning import plan_cache, replan
from tightfit.planning.plan_cache import PlanCache
from tightfit.profiling.measure import measure_step
from tightfit.profiling.remeasure import complete, measure_reshaped
from tightfit.records import Profile
from tightfit.solver.solver import Solver
from tightfit.step.step import Step

# ---------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_measuring_again_in_short_gives_the_same_peaks_as_in_full(reference: Profile, length: int) -> None:
    model = Transformer()
    step = Step(loss=next_word_loss, optimizer=(adamw(model),), clip_norm=1.0)
    whole, short = (
        measure_step(model, batch_of(length), step),
        measure_reshaped(model, batch_of(length), step, reference, 2**40),
    )
    short.check()
    assert short.measuring_ms["times"] < 1
    assert short.baseline == whole.baseline
    for budget in ("plain", "full"):
        one, other = (getattr(Solver(profile), budget)(2**40) for profile in (whole, short))
        # The reference had no clipping: what is taken from it is its own optimizer's step.
        assert one.predicted_peak_bytes == other.predicted_peak_bytes
        assert one.peak_where == other.peak_where
        assert other.predicted_step_ms > 0
    ratio = Solver(short).plain(0).plain_step_ms / Solver(reference).plain(0).plain_step_ms
    assert (ratio > 1) is (length > MIDDLE)


def test_measuring_in_short_knows_when_it_is_another_step(reference: Profile) -> None:
    other = Transformer(depth=1)
    step = Step(loss=next_word_loss)
    profile = measure_step(other, batch_of(MIDDLE), step, untimed=True)
    assert complete(profile, reference) is None
    assert measure_reshaped(other, batch_of(MIDDLE), step, reference, 2**40).mode_ms_per_op > 0  # in full


def test_other_lengths_are_planned_before_they_run(case: Case) -> None:
    for length in (LONG, SHORT, LONG):
        batch = batch_of(length)
        assert case.peak(batch) <= case.budget_bytes
        case.assert_gradients_are_plain(batch)
        assert case.applied.active_plan is not None
        assert case.applied.active_plan.predicted_peak_bytes <= case.budget_bytes
        assert case.applied.active_plan.batch == f"int64[4x{length + 1}]"
    counts = case.counts
    assert (counts.tried, counts.solved + counts.reused + counts.plain) == (0, 2)
    assert (counts.mismatched_steps, counts.unplanned_calls, counts.ample) == (0, 0, 0)
    assert counts.planning_ms > 0
    assert case.applied.plan.batch == f"int64[4x{MIDDLE + 1}]"


class LooksAtItsInput(Block):
    """Takes another way where its input has no data, so that it has to be measured by real steps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sin() if type(x) is torch.Tensor else x)


def test_other_lengths_of_a_model_that_only_real_steps_can_measure(budget_bytes: int) -> None:
    model = Transformer()
    model.blocks = nn.ModuleList(LooksAtItsInput() for _ in range(2))
    case = Case(model, budget_bytes * 9 // 8)
    assert case.applied.profile is not None
    assert case.applied.profile.method == "real"
    for length in (LONG, SHORT):
        assert case.peak(batch_of(length)) <= case.budget_bytes
        case.assert_gradients_are_plain(batch_of(length))
    # The longer batch may need regions to be recomputed that were not before: their self-checks take memory once.
    counts = case.counts
    assert (counts.tried <= 1, counts.mismatched_steps) == (True, 0)
    assert counts.tried + counts.reused + counts.solved + counts.plain == 2
    case.applied.remove()


def test_other_batch_sizes(case: Case) -> None:
    batch = batch_of(MIDDLE, size=3)  # the last, incomplete one
    assert case.peak(batch) <= case.budget_bytes
    with case.applied.paused():
        plain = gradients(case.model, lambda: next_word_loss(case.model, batch))
    assert differences(plain, gradients(case.model, lambda: case.loss(batch))) == []
    assert len(case.plans) == 2


def test_what_does_not_fit_is_refused_before_forward(case: Case) -> None:
    batch = batch_of(200, size=8)
    case.loss(batch_of(SHORT)).backward()
    before = case.applied.resolved, case.model.forwards, torch.get_rng_state(), len(case.plans)
    installed = {name: vars(m)["forward"] for name, m in case.model.named_modules() if "forward" in vars(m)}
    with pytest.raises(BudgetInfeasible) as caught:
        case.loss(batch)
    assert case.budget_bytes < caught.value.required_bytes
    assert case.applied.resolved is before[0]
    assert case.model.forwards == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert len(case.plans) == before[3]
    assert installed == {name: vars(m)["forward"] for name, m in case.model.named_modules() if "forward" in vars(m)}
    with pytest.raises(BudgetInfeasible), case.applied.step(batch):
        pytest.fail("the step began")
    case.assert_gradients_are_plain(batch_of(SHORT))


def test_decisions_are_reused_until_that_has_cost_as_much_as_solving(case: Case) -> None:
    case.applied.prepare(batch_of(LONG))
    assert (case.counts.solved, case.counts.reused) == (1, 0)  # what was decided for a shorter batch does not fit
    near = LONG - 1
    case.applied.prepare(batch_of(near))
    assert (case.counts.solved, case.counts.reused) == (1, 1)
    assert case.peak(batch_of(near)) <= case.budget_bytes
    reused = case.applied.active_plan
    assert reused is not None
    case.plans._solving_ms = case.plans._lost_ms + 1.0  # whatever this machine took
    steps = 0
    while case.counts.solved == 1:
        case.applied.prepare(batch_of(near))  # as in each step
        steps += 1
        assert steps < 100_000
    assert steps > 1
    assert case.peak(batch_of(near)) <= case.budget_bytes
    assert case.applied.active_plan is not None
    assert case.applied.active_plan.predicted_step_ms <= reused.predicted_step_ms
    solved = case.counts.solved
    for _ in range(50):
        case.applied.prepare(batch_of(near))
    assert case.counts.solved == solved


def test_a_margin_and_what_repair_added_hold_for_other_shapes(
    budget_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = replan.measure_reshaped
    forgotten_bytes = 64 * 1024
    found = []

    def forgetful(*arguments: Any) -> Profile:
        found.append(measure(*arguments))
        return found[-1]

    monkeypatch.setattr(replan, "measure_reshaped", forgetful)
    monkeypatch.setattr(replan, "_replaying", lambda plan: set())  # as if all of these regions were self-checked
    case = Case(Transformer(), budget_bytes)
    for reference in case.plans._replanner._references:
        reference.correction_bytes = forgotten_bytes
    case.applied.prepare(batch_of(LONG))
    case.loss(batch_of(LONG))
    plan = case.applied.active_plan
    assert plan is not None
    margin_bytes = int(replan.UNCONFIRMED_MARGIN * (budget_bytes - found[0].baseline_bytes))
    growth = replan._activation_bytes(found[0]) / replan._activation_bytes(case.applied.profile)
    assert growth > 1
    assert plan.breakdown["correction"] == margin_bytes + int(forgotten_bytes * growth)
    assert plan.predicted_peak_bytes <= budget_bytes
    case.applied.remove()


@pytest.mark.slow
def test_where_the_margin_does_not_fit_the_plan_is_run_under_the_meter(reference: Profile, budget_bytes: int) -> None:
    case = Case(Transformer(), budget_bytes)
    case.applied.remove()
    step = Step(loss=next_word_loss, optimizer=(case.optimizer,))
    smallest = Solver(measure_reshaped(case.model, batch_of(LONG), step, reference, 2**40)).minimum_budget()[0]
    case = Case(Transformer(), smallest + 2000)
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    assert case.peak(batch_of(LONG)) <= smallest + 2000
    assert case.counts.tried == 1
    assert case.applied.statistics.mismatches == 0
    case.applied.remove()
    assert state.keys() == case.model.state_dict().keys()


def test_a_budget_that_plain_fits_many_times_over_costs_no_measuring() -> None:
    model = Transformer()
    with tightfit.fit(model, batch_of(MIDDLE), budget="1GiB", loss=next_word_loss) as applied:
        assert isinstance(applied.plans, PlanCache)
        for length in range(SHORT, LONG):
            applied.loss(model, batch_of(length))
            next_word_loss(model, batch_of(length))
            assert not applied.installed
        counts = applied.plans.statistics
        assert counts.ample == LONG - SHORT - 1
        assert (counts.plain, counts.solved, counts.unplanned_calls) == (0, 0, 0)
        assert not any(isinstance(vars(m).get("forward"), RegionForward) for m in model.blocks.modules())
    assert "forward" not in vars(model)


def test_no_more_plans_are_kept_than_stated(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "MOST_PLANS", 3)
    for length in (41, 42, 43, 44):
        case.loss(batch_of(length))
    assert len(case.plans) == 3
    assert case.counts.forgotten == 2
    assert len(case.plans._calls) <= 3
    case.loss(batch_of(44))
    planned = case.counts.planning_ms
    case.loss(batch_of(43))
    assert case.counts.planning_ms == planned
    case.loss(batch_of(41))
    assert case.counts.planning_ms > planned


def test_backwards_that_are_pending_while_another_plan_comes_into_force(case: Case) -> None:
    batches = [batch_of(length) for length in (SHORT, LONG, MIDDLE)]
    for batch in batches:
        case.applied.prepare(batch)

    def three_losses(loss: Any) -> Tensor:
        first, second, third = (loss(batch) for batch in batches)
        return first * 0.5 + second + third * 2

    with case.applied.paused():
        plain = gradients(case.model, lambda: three_losses(lambda b: next_word_loss(case.model, b)))
    case.applied.statistics.reset()
    assert differences(plain, gradients(case.model, lambda: three_losses(case.loss))) == []
    assert case.applied.statistics.replayed_ops > 0
    assert case.applied.statistics.mismatches == 0


# ---------------------------------------------------------------------------------------------------- who tells


def test_step_with_a_batch_and_without(case: Case) -> None:
    batch = batch_of(LONG)
    with case.applied.paused():
        plain = gradients(case.model, lambda: next_word_loss(case.model, batch))

    def told() -> Tensor:
        with case.applied.step(batch):
            return next_word_loss(case.model, batch)

    def untold() -> Tensor:
        with case.applied.step():
            return next_word_loss(case.model, batch)

    with pytest.warns(PromiseWarning, match=r"have no plan: int64\[4x64\]"):
        assert differences(plain, gradients(case.model, untold)) == []
    assert case.applied.active_plan is None
    assert case.counts.unplanned_calls == 1
    dropped = case.applied.statistics.dropped_slots
    assert differences(plain, gradients(case.model, told)) == []
    planned = case.applied.active_plan
    assert planned is not None
    assert case.counts.solved == 1
    case.applied.statistics.reset()
    assert differences(plain, gradients(case.model, untold)) == []  # the model knows this call by now
    assert case.applied.active_plan is planned
    assert case.counts.unplanned_calls == 1
    assert 0 < case.applied.statistics.dropped_slots < dropped


def test_a_bare_call_of_a_shape_that_was_never_planned_drops_all_that_it_can(case: Case) -> None:
    for length, unplanned in ((MIDDLE, 0), (LONG, 1), (MIDDLE, 1), (200, 2)):
        batch = batch_of(length)
        with case.applied.paused():
            plain = gradients(case.model, lambda batch=batch: next_word_loss(case.model, batch))
        told = pytest.warns(PromiseWarning, match="have no plan") if length == LONG else nullcontext()  # and once only
        with told:
            planned = gradients(case.model, lambda batch=batch: next_word_loss(case.model, batch))
        assert differences(plain, planned) == []
        assert case.counts.unplanned_calls == unplanned
        assert (case.applied.active_plan is None) is (length != MIDDLE)
    batch = batch_of(LONG)
    dropped_bytes = peak_of(case.model, batch, case.optimizer, lambda: next_word_loss(case.model, batch))
    with case.applied.paused():
        plain_bytes = peak_of(case.model, batch, case.optimizer, lambda: next_word_loss(case.model, batch))
    assert dropped_bytes < 0.75 * plain_bytes  # what the loss saves is none of the model's


def test_without_gradients_nothing_is_planned(case: Case) -> None:
    with torch.no_grad(), case.applied.step(batch_of(LONG)):
        case.model(batch_of(LONG))
    with case.applied.paused():
        case.loss(batch_of(LONG))
    assert len(case.plans) == 1
    assert case.counts == PlanStatistics()


def test_while_a_profiler_runs_a_new_shape_is_not_measured_but_dropped(case: Case) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        case.assert_gradients_are_plain(batch_of(LONG))
    assert case.counts.unplanned_calls == 1
    assert len(case.plans) == 1
    case.assert_gradients_are_plain(batch_of(LONG))
    assert len(case.plans) == 2


def test_a_plan_applied_without_fit_drops_all_on_another_shape(reference: Profile) -> None:
    model = Transformer()
    solver = Solver(reference)
    plan = solver.solve((solver.minimum_budget()[0] + solver.plain(0).plain_peak_bytes) // 2)
    with tightfit.apply(model, plan, step=Step(loss=next_word_loss)) as applied:
        for length in (MIDDLE, LONG, MIDDLE):
            batch = batch_of(length)
            with applied.paused():
                plain = gradients(model, lambda batch=batch: next_word_loss(model, batch))
            planned = gradients(model, lambda batch=batch: applied.loss(model, batch))
            assert differences(plain, planned) == []
            assert (applied.active_plan is plan) is (length == MIDDLE)
        applied.prepare(batch_of(LONG))  # nothing to do
