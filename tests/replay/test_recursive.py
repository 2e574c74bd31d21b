"""Below one level: shared tapes and nests on random programs, as the simulator says, and depth against held memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tightfit
from tests.replay.programs import Program, loss_of, programs
from tests.replay.test_random_modules import INEXACT, RANDOM_STATE_BYTES, SMALL, check_same, is_random, steps
from tests.support.chains import RNN, ResidualMLP
from tightfit.device import memory as meter
from tightfit.records import Decision, Plan, SharedTape
from tightfit.records.recompute_tree import RecomputeTree, balanced_tree
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.tape import Tape
from tightfit.report.plan_table import format_plan
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver.columns import keeping
from tightfit.solver.plan_builder import build_plan
from tightfit.solver.solver import Solver, minimum_budget


@st.composite
def shared_decisions(draw: st.DrawFn, index: ProfileIndex) -> tuple[list[Decision | None], tuple[SharedTape, ...]]:
    """Any decisions, with any consecutive regions on shared tapes, any leaves and any tree."""
    regions = index.profile.regions
    shared_tapes: list[SharedTape] = []
    first = 0
    while first < len(regions):
        count = draw(st.integers(1, len(regions) - first))
        ops = [(region, position) for region in range(count) for position in range(regions[first + region].op_count)]
        cuts = sorted(draw(st.sets(st.sampled_from(ops[1:]), max_size=12))) if len(ops) > 1 else []
        at_top = [draw(st.booleans()) for _ in cuts]
        tree = balanced_tree(cuts, at_top, draw(st.integers(2, 4)))
        shared_tapes.append(SharedTape(first=first, count=count, tree=tree))
        first += count
    decisions: list[Decision | None] = []
    for shared in shared_tapes:
        facts = index.tape_facts(shared.first, shared.count)
        optional = sorted(facts.optional)
        kept = draw(st.lists(st.sampled_from(optional), unique=True)) if optional and draw(st.booleans()) else []
        for region in range(shared.first, shared.first + shared.count):
            decisions.append(keeping(index, [v for v in kept if index.producer_region(v) == region]))
    return decisions, tuple(shared_tapes)


@settings(SMALL, max_examples=6)
@given(programs(without=INEXACT, rows=64, columns=128), st.data())
@pytest.mark.slow
def test_any_tree_over_any_program(model: Program, data: st.DataObject) -> None:
    batch = model.batch
    plain = steps(model, batch)
    model.reset()
    profile = tightfit.measure(model, batch, loss=loss_of)
    index = ProfileIndex(profile)
    decisions, shared_tapes = data.draw(shared_decisions(index))
    simulated = simulate(index, decisions, shared_tapes)
    plan = build_plan(index, decisions, 2**40, shared_tapes=shared_tapes)
    plan.check()
    with tightfit.apply(model, plan) as applied:
        check_same(plain, steps(model, batch, applied))
        check_same(plain, steps(model, batch, applied))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        model.reset()
        applied.statistics.reset()

        def step() -> None:
            with applied.step():
                loss = loss_of(model, batch)
            loss.backward()

        _, peak_bytes = meter.measure_peak(step, meter.resident_bytes(model, batch))
    counts = applied.statistics
    assert (counts.mismatches, counts.unplanned_calls) == (0, 0)
    assert counts.replayed_ops == len(simulated.replayed_ops)
    drawn = sum(is_random(profile.signatures[op.signature].name) for op in profile.ops)
    assert peak_bytes <= plan.predicted_peak_bytes + 256 + drawn * RANDOM_STATE_BYTES
    assert peak_bytes >= 0.94 * plan.predicted_peak_bytes


def test_a_nest_holds_what_its_subtrees_pass_on() -> None:
    nest = balanced_tree([(0, n) for n in range(1, 8)], [False, False, False, True, False, False, False], 2)
    assert nest.depths == (2, 1, 2, 0, 2, 1, 2)
    assert nest.leaf_count == 8
    assert [nest.leaf_at(0, n) for n in (0, 1, 7, 9)] == [0, 1, 7, 7]
    assert nest.leaf_at(1, 0) == 7
    # Made in one leaf and used up to another: the leaves for which replay holds it.
    held = {(1, 2): {0, 1, 2, 3}, (0, 1): {0, 1}, (3, 4): set(range(8)), (2, 2): {2}, (4, 6): {4, 5, 6, 7}}
    for (first, last), leaves in held.items():
        assert {leaf for leaf in range(8) if nest.holds(first, last, leaf)} == leaves
    assert balanced_tree([(0, n) for n in range(1, 6)], [False] * 5, 9).depths == (1,) * 5
    assert RecomputeTree().holds(0, 0, 0)


def check_step(model: nn.Module, batch: Tensor, plan: Plan) -> None:
    """Bit for bit the plain gradients, the predicted peak to the byte, and each operation as often as predicted."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    plain_loss = model(batch)
    plain_loss.backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with tightfit.apply(model, plan) as applied:
        for _ in range(2):  # the first step is the self-check
            model.zero_grad(set_to_none=False)
            applied.statistics.reset()
            resident = meter.resident_bytes(model, batch)

            def step() -> Tensor:
                loss = applied.loss(model, batch)
                loss.backward()
                return loss

            loss, peak_bytes = meter.measure_peak(step, resident)
            assert torch.equal(loss, plain_loss)
            assert all(
                torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True) if p.grad is not None
            )
        assert (applied.statistics.mismatches, applied.statistics.kept_unsafe) == (0, 0)
    assert abs(peak_bytes - plan.predicted_peak_bytes) <= 256


@pytest.mark.slow
@pytest.mark.exhaustive
def test_64_residual_layers_in_the_logarithm_of_their_depth() -> None:
    torch.manual_seed(0)
    batch = torch.randn(512, 8)
    passing_bytes = batch.nbytes  # what goes from layer to layer
    smallest = {}
    for depth in (16, 32, 64):
        model = ResidualMLP(depth)
        profile = tightfit.measure(model, batch)
        solver = Solver(profile)
        smallest[depth] = solver.minimum_budget()[0] - profile.baseline_bytes
    # Twice the depth, one more value held.
    assert all(smallest[2 * depth] - smallest[depth] <= passing_bytes + 64 for depth in (16, 32))
    # About the square root, for at most one more run of each operation.
    forward_ops = {op for region in profile.regions for op in range(region.first_op, region.first_op + region.op_count)}
    budget = profile.baseline_bytes + smallest[16] + 4 * 8 * passing_bytes
    middle = solver.solve(budget)
    replayed = simulate(solver.index, middle.decisions, middle.shared_tapes).replayed_ops
    assert len(replayed) <= 2 * len(forward_ops)
    check_step(model, batch, middle)
    lowest = solver.solve(profile.baseline_bytes + smallest[64])
    assert "recursive recomputation" in format_plan(lowest)
    check_step(model, batch, lowest)


@pytest.mark.slow
def test_12_steps_of_a_loop_in_one_region() -> None:
    torch.manual_seed(0)
    smallest = {}
    for length in (6, 12):
        batch = torch.randn(length, 64, 16)
        model = RNN()
        profile = tightfit.measure(model, batch)
        solver = Solver(profile)
        smallest[length] = solver.minimum_budget()[0] - profile.baseline_bytes
    assert smallest[12] - smallest[6] <= 2 * batch[0].nbytes
    check_step(model, batch, solver.solve(solver.minimum_budget()[0]))


def test_regions_of_a_shared_tape_that_another_plan_never_ran_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for other shapes share self-checks: its first region may have had one, and the others not."""
    model, batch = ResidualMLP(6), torch.randn(64, 8)
    profile = tightfit.measure(model, batch)
    plan = tightfit.solve(profile, minimum_budget(profile)[0])
    assert plan.shared_tapes
    watched: set[str] = set()
    begin = Tape.begin_region

    def noting(tape: Tape, recipe: ResolvedRecipe | None, refused: set[int], **options: Any) -> None:
        begin(tape, recipe, refused, **options)
        if tape.is_self_checking and recipe is not None and recipe.shared is not None:
            watched.add(plan.regions[recipe.shared.first + recipe.place].key)

    monkeypatch.setattr(Tape, "begin_region", noting)
    first, *others = [region.key for region in plan.regions]
    with tightfit.apply(model, plan) as applied:
        applied.resolved.checked.add(first)
        applied.loss(model, batch).backward()
        assert watched == set(others)
        watched.clear()
        applied.loss(model, batch).backward()
        assert watched == set()
