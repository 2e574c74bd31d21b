"""The baselines against searches of their own, and tightfit's plans against the baselines."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations

import pytest

from benchmarks.baselines.checkmate import checkmate, only
from benchmarks.baselines.policies import best_that_fits, every_kth, greedy, knapsack, make_pool, restricted
from benchmarks.baselines.rotor import Stage, chain_of, in_slots, one_level_decisions, rotor
from tests.solver.profiles import STREAM, OpSpec, Own, chain_template, gpt_profile, profile_of, random_profile
from tightfit.records import EventKind, Profile
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver.effort import SOLVE_WORK, Effort
from tightfit.solver.lower_bound import added_ms_bound
from tightfit.solver.solver import Solver

# ---------------------------------------------------------------------------------------------------------- rotor


def search_chain(stages: Sequence[Stage], memory: int) -> float | None:
    """Least recomputation of a persistent schedule, by a search over what is in memory; None if nothing fits.

    Dijkstra over (stage whose gradient is there, stage up to which the sweep has come, what is stored).  Stored is
    ("in", s): the input of stage s, checkpointed; or ("all", s): all that s saved.  Both stay until the backward of s.
    """
    n = len(stages)

    def nbytes(stored: frozenset[tuple[str, int]]) -> int:
        return sum(
            stages[s].saved_bytes if kind == "all" else stages[s - 1].output_bytes
            for kind, s in stored
            if s or kind == "all"
        )

    start = (n - 1, 0, False, frozenset({("in", 0)}))
    # (gradient's stage, position: the next forward to run, whether its input is only passing, stored)
    queue = [(0.0, 0, start)]
    best = {start: 0.0}
    number = 0
    while queue:
        ms, _, state = heapq.heappop(queue)
        grad, at, passing, stored = state
        if grad < 0:
            return ms - sum(s.forward_ms for s in stages)
        if best[state] < ms:
            continue
        steps: list[tuple[float, tuple[int, int, bool, frozenset[tuple[str, int]]]]] = []
        input_bytes = stages[at - 1].output_bytes if passing else 0
        used = nbytes(stored) + stages[grad].gradient_bytes
        kinds = dict.fromkeys(k for k, s in stored if s == at)
        if at <= grad:
            stage = stages[at]
            # Run it and save all (its input stays, too: stored, or within the saved of the stage before).
            if (not passing or ("all", at - 1) in stored) and "all" not in kinds:
                room = used + (0 if ("all", at - 1) in stored or not passing else input_bytes)
                if room + stage.saved_bytes + stage.forward_transient_bytes <= memory:
                    steps.append((stage.forward_ms, (grad, at + 1, True, stored | {("all", at)})))
            # Put a checkpoint here, if the input is only passing.
            if passing and ("all", at - 1) not in stored:
                steps.append((0.0, (grad, at, False, stored | {("in", at)})))
            # Run it and save nothing.
            if at < grad and "all" not in kinds:
                room = used + (input_bytes if passing and ("all", at - 1) not in stored else 0)
                if room + stage.output_bytes + stage.forward_transient_bytes <= memory:
                    steps.append((stage.forward_ms, (grad, at + 1, True, stored)))
        stage = stages[grad]
        if ("all", grad) in stored and at == grad + 1:
            inputs = stored | {("in", 0)}
            if (
                ("in", grad) in inputs or ("all", grad - 1) in stored
            ) and used + stage.backward_transient_bytes <= memory:
                left = stored - {("all", grad), ("in", grad)}
                if grad == 0:
                    steps.append((0.0, (-1, 0, False, frozenset())))
                elif ("all", grad - 1) in left:
                    steps.append((0.0, (grad - 1, grad, False, left)))
                else:  # back to the last thing that is stored
                    last = max(s for _, s in left)
                    kind = "all" if ("all", last) in left else "in"
                    at_again = last + 1 if kind == "all" else last
                    steps.append((0.0, (grad - 1, at_again, kind == "all", left)))
        for cost, following in steps:
            if ms + cost < best.get(following, math.inf):
                best[following] = ms + cost
                number += 1
                heapq.heappush(queue, (ms + cost, number, following))
    return None


def random_chain(rng: random.Random) -> list[Stage]:
    stages = []
    for _ in range(rng.randint(2, 5)):
        output = rng.randint(1, 3)
        stages.append(
            Stage(
                forward_ms=float(rng.randint(1, 9)),
                backward_ms=float(rng.randint(1, 9)),
                output_bytes=output,
                saved_bytes=output + rng.randint(0, 5),
                forward_transient_bytes=rng.choice([0, 0, 2, 6]),
                backward_transient_bytes=rng.choice([0, 0, 3]),
                gradient_bytes=rng.choice([0, 1]),
            )
        )
    return stages


def test_rotor_against_search() -> None:
    rng = random.Random(1)
    recomputing = infeasible = 0
    for _ in range(150):
        stages = random_chain(rng)
        for memory in range(2, 26, 2):
            found, expected = rotor(stages, memory), search_chain(stages, memory)
            if expected is None:
                assert found is None
                infeasible += 1
            else:
                assert found is not None
                assert found.recompute_ms == pytest.approx(expected)
                total = sum(s.forward_ms * (runs - 1) for s, runs in zip(stages, found.runs, strict=True))
                assert found.recompute_ms == pytest.approx(total)
                recomputing += found.recompute_ms > 0
    assert recomputing > 100
    assert infeasible > 20


def test_a_chain_in_slots_holds_within_the_memory() -> None:
    """Sizes are rounded up, so that what holds in slots holds in bytes."""
    rng = random.Random(2)
    for _ in range(40):
        stages = random_chain(rng)
        for memory in (9, 14, 20):
            coarse = rotor(*in_slots(stages, memory, slots=4))
            fine = rotor(stages, memory)
            if coarse is not None:
                assert fine is not None
                assert fine.recompute_ms <= coarse.recompute_ms + 1e-9


def test_a_profile_as_a_chain() -> None:
    profile = profile_of([chain_template(3)], [0, 0, 0])
    index = ProfileIndex(profile)
    stages, regions = chain_of(index)
    assert regions == [0, 1, 2]
    assert [stage.forward_ms for stage in stages] == [1.0 + 2.0 + 3.0] * 3
    assert sum(s.forward_ms + s.backward_ms for s in stages) + 0.5 == profile.plain_step_ms  # and the optimizer's
    assert [stage.output_bytes for stage in stages] == [64, 64, 0]
    assert [stage.saved_bytes for stage in stages] == [3 * 64] * 3
    ample = rotor(stages, 10**6)
    assert ample is not None
    assert one_level_decisions(index, regions, ample) == [None] * 3
    tight = rotor(stages, 2 * 192 + 64)
    assert tight is not None
    decisions = one_level_decisions(index, regions, tight)
    assert decisions is not None
    assert BY_VALUE.decide(()) in decisions


# ------------------------------------------------------------------------------------------------------ Checkmate


def search_schedules(index: ProfileIndex, region: int, budget_bytes: int) -> float | None:
    """Least recomputation of one region within the budget, by a search over what is in memory; None if nothing fits.

    Dijkstra over (event, operation last run at it, values there).  Independent of the program: it walks events.
    """
    profile, facts = index.profile, index.facts[region]
    middle = index.backward_event()
    events = profile.events
    offset = profile.baseline_bytes + profile.correction_bytes + profile.margin_bytes
    level = [offset + nbytes for nbytes in index.fixed_levels]
    high = [nbytes + index.fixed_spikes.get(time, 0) for time, nbytes in enumerate(level)]
    released = {e.a: time for time, e in enumerate(events) if e.kind == EventKind.RELEASE}
    reads = {time: e.a for time, e in enumerate(events) if e.kind == EventKind.UNPACK and e.a in facts.slots}
    ran = {e.a: time for time, e in enumerate(events) if e.kind == EventKind.OP}
    ops = sorted(index.rebuilding_ops(facts, frozenset()))

    def size(values: frozenset[int]) -> int:
        return sum(index.nbytes(value) for value in values)

    holdable = {v for op in ops for v in (*profile.ops[op].inputs, *profile.ops[op].outputs)}
    holdable = {v for v in holdable if not index.is_free(v) and not profile.values[v].overwritten}
    queue: list[tuple[float, int, int, frozenset[int]]] = []
    for held in map(frozenset, chain.from_iterable(combinations(holdable, n) for n in range(len(holdable) + 1))):
        fits = all(
            high[time]
            + sum(
                index.nbytes(v)
                for v in held
                if ran.get(profile.values[v].op, 0) <= time and not index.fixed_at(profile.values[v].storage, time)
            )
            <= budget_bytes
            for time in range(middle)
        )
        if fits:
            queue.append((0.0, middle, -1, held))
    heapq.heapify(queue)
    best: dict[tuple[int, int, frozenset[int]], float] = {}
    while queue:
        ms, time, last, there = heapq.heappop(queue)
        if time == len(events):
            return ms
        if best.get((time, last, there), math.inf) <= ms:
            continue
        best[time, last, there] = ms
        pinned = {profile.slots[s].value for t, s in reads.items() if t < time < released.get(s, len(events))}
        if time in reads:
            if level[time] + size(there) > budget_bytes:
                continue
            for value in there - pinned:
                heapq.heappush(queue, (ms, time, last, there - {value}))
            for op in ops:
                record = profile.ops[op]
                if op <= last or not all(index.is_free(u) or u in there for u in record.inputs):
                    continue
                signature = profile.signatures[record.signature]
                made = frozenset(record.outputs)
                inside = sum(index.nbytes(v) for v in made) + signature.workspace_bytes
                if level[time] + size(there) + inside <= budget_bytes:
                    heapq.heappush(queue, (ms + signature.ms, time, op, there | made))
            if profile.slots[reads[time]].value not in there:
                continue
            if high[time] + size(there) <= budget_bytes:
                heapq.heappush(queue, (ms, time + 1, -1, there))
            continue
        kind, a = events[time]
        ways = {there}
        if kind == EventKind.RELEASE and a in facts.slots:
            value = profile.slots[a].value
            if not any(profile.slots[s].value == value and t < time < released.get(s, 0) for t, s in reads.items()):
                ways.add(there - {value})
        for left in ways:
            if high[time] + size(left) <= budget_bytes:
                heapq.heappush(queue, (ms, time + 1, -1, left))
    return None


def small_rows(count: int) -> Iterator[tuple[Profile, int]]:
    """Random profiles in which only one region may drop, without in-place writes, small enough to be searched."""
    found = 0
    for seed in range(10**4):
        profile = random_profile(seed, regions=2, most_ops=5)
        region = len(profile.regions) - 1
        profile = only(profile, region, 1)
        index = ProfileIndex(profile)
        ops = index.rebuilding_ops(index.facts[region], frozenset())
        values = {v for op in ops for v in (*profile.ops[op].inputs, *profile.ops[op].outputs)}
        backward = range(index.backward_event(), len(profile.events))
        simple = not any(op.mutates for op in profile.ops) and not any(
            index.fixed_at(profile.values[v].storage, time) for v in values for time in backward if not index.is_free(v)
        )
        if simple and len(ops) >= 2 and len(values) <= 7:
            yield profile, region
            found += 1
            if found == count:
                return


def test_checkmate_against_search() -> None:
    recomputing = infeasible = below_tightfit = 0
    for profile, region in small_rows(25):
        index, solver = ProfileIndex(profile), Solver(profile)
        least = solver.smallest_at_one_level().peak_bytes
        plain = solver.plain(0).predicted_peak_bytes
        for budget in sorted({least - 40, least - 8, least, (least + plain) // 2, plain - 1}):
            found, expected = checkmate(index, region, 1, budget), search_schedules(index, region, budget)
            if expected is None:
                assert found.status == "infeasible"
                infeasible += 1
                continue
            assert found.status == "optimal"
            assert found.recompute_ms == pytest.approx(expected, abs=1e-6)
            assert found.bound_ms == pytest.approx(expected, abs=1e-5)
            recomputing += expected > 0
            below_tightfit += budget < least
    assert recomputing > 10
    assert infeasible > 5


def test_checkmate_on_a_chain_by_hand() -> None:
    """Three operations of 1, 2 and 3 ms, 64 bytes each, all saved; tightfit's least peak is 144 + 2 x 64 + 16."""
    profile = only(profile_of([chain_template(3)], [0]), 0, 1)
    index = ProfileIndex(profile)
    # The first is dropped and replayed when the two others are gone: also tightfit's plan.
    assert checkmate(index, 0, 1, 144 + 128 + 16).recompute_ms == pytest.approx(1.0)
    # Only the last is held; the second is replayed from the first, which is let go and replayed again: 1 + 2, then 1.
    for budget in (144 + 128 + 15, 144 + 128 + 8):
        found = checkmate(index, 0, 1, budget)
        assert found.recompute_ms == pytest.approx(4.0)
        assert found.runs == ((1, 0), (1, 1), (2, 0))
    assert checkmate(index, 0, 1, 144 + 128 + 7).status == "infeasible"
    assert Solver(profile).smallest_at_one_level().peak_bytes == 144 + 128 + 16


def test_a_value_held_for_a_part_of_backward() -> None:
    """What tightfit's plan space lacks: a value is held up to one read, let go, and replayed for the next."""
    template = (
        OpSpec(ms=2.0, reads=(STREAM,), makes=(64,), saves=(Own(0),)),
        OpSpec(ms=1.0, reads=(STREAM,), makes=(8,), saves=(Own(1),), backward_workspace=400),
        OpSpec(ms=1.0, reads=(Own(0),), makes=(8,), saves=(Own(0),)),
    )
    profile = only(profile_of([template], [0]), 0, 1)
    solver = Solver(profile)
    plain = solver.plain(0).predicted_peak_bytes
    assert solver.smallest_at_one_level().peak_bytes == plain  # held or memoised, it is there between its two reads
    found = checkmate(solver.index, 0, 1, plain - 64)
    assert found.recompute_ms == search_schedules(solver.index, 0, plain - 64) == pytest.approx(2.0)
    assert found.runs == ((2, 0),)  # held up to the first read, let go, replayed at the last
    assert checkmate(solver.index, 0, 1, plain - 72).status == "infeasible"


@pytest.mark.thorough
def test_tightfit_is_never_faster_than_checkmate_and_equal_where_its_space_is_exact() -> None:
    """At zero overhead, one region: the program's space contains tightfit's one-level plans."""
    equal = total = 0
    for seed in range(60):
        profile = random_profile(seed, regions=2, most_ops=6)
        region = random.Random(seed).randrange(len(profile.regions))
        solver = Solver(only(profile, region, 1))
        least, plain = solver.smallest_at_one_level().peak_bytes, solver.plain(0).predicted_peak_bytes
        for budget in {least, (least + plain) // 2}:
            plan = solver.solve(budget)
            if plan.shared_tapes:
                continue
            found = checkmate(solver.index, region, 1, budget)
            added_ms = plan.predicted_step_ms - plan.plain_step_ms
            assert found.status == "optimal"
            assert found.recompute_ms is not None
            assert found.recompute_ms <= added_ms + 1e-6
            total += 1
            equal += found.recompute_ms >= added_ms - 1e-6
    assert total > 60
    assert equal >= 0.95 * total


def test_checkmate_may_drop_what_passes_between_blocks() -> None:
    """Two chains in a row: tightfit holds the value between them at one level; the program may rebuild it."""
    profile = only(profile_of([chain_template(2, 64)], [0, 0]), 0, 2)
    solver = Solver(profile)
    least = solver.smallest_at_one_level().peak_bytes
    plan_ms = solver.smallest_at_one_level().step_ms - profile.plain_step_ms
    together = checkmate(solver.index, 0, 2, least)
    assert together.recompute_ms is not None
    assert together.recompute_ms <= plan_ms + 1e-6


# ------------------------------------------------------------------------------------------------ plans and bounds


@pytest.mark.thorough
def test_the_bound_is_never_above_the_plan() -> None:
    """Profiles too large for the brute force of `test_solver`: many regions, columns by pricing.

    The bound is taken before it is written to a plan, where it is cut to the plan's own time.
    """
    replaying = tight = 0
    for seed in range(18):
        profile = random_profile(seed + 500, regions=7, most_ops=9)
        pool = make_pool(profile)
        plain = pool.source.peaks(pool.master.chosen([None] * len(profile.regions))).max()
        for share in (0.0, 0.3, 0.7):
            budget = pool.smallest[0] + int((plain - pool.smallest[0]) * share)
            outcome = restricted(pool, lambda _, __: True, budget)
            relaxation = pool.master.relaxed(budget)
            if outcome is None or relaxation is None:
                continue
            added_ms = outcome.simulation.step_ms - profile.plain_step_ms
            bound_ms = added_ms_bound(pool, relaxation.prices, budget, Effort(SOLVE_WORK))
            assert bound_ms <= added_ms + 1e-9 * profile.plain_step_ms
            replaying += added_ms > 0
            tight += 0 < added_ms <= bound_ms * 1.01
    assert replaying > 20
    assert tight > 0  # so that a bound a little too high would be found out


def test_where_every_decision_is_on_offer_the_bound_is_the_plan() -> None:
    found = 0
    for seed in range(12):
        profile = random_profile(seed + 900, regions=5, most_ops=4)
        pool = make_pool(profile)
        plain = pool.source.peaks(pool.master.chosen([None] * len(profile.regions))).max()
        for share in (0.2, 0.6):
            budget = pool.smallest[0] + int((plain - pool.smallest[0]) * share)
            plan = Solver(profile).solve(budget)
            if pool.is_complete and not plan.is_plain and not plan.shared_tapes:
                assert plan.lower_bound_ms == pytest.approx(plan.predicted_step_ms, rel=1e-7)
                found += 1
    assert found > 5


@pytest.mark.thorough
def test_no_policy_beats_the_solver() -> None:
    """tightfit chooses exactly among its columns, so nothing that chooses among the same columns is faster."""
    profile = gpt_profile(3, width=64, tokens=16)
    solver = Solver(profile)
    index, pool = solver.index, make_pool(profile)
    least, plain = solver.smallest_at_one_level().peak_bytes, solver.plain(0).predicted_peak_bytes
    slower = 0
    for share in (0.2, 0.5, 0.8):
        budget = least + int((plain - least) * share)
        best_ms = solver.solve(budget).predicted_step_ms
        every = restricted(pool, lambda _, __: True, budget)
        assert every is not None
        assert every.simulation.step_ms == pytest.approx(best_ms, abs=1e-6)
        candidates = (greedy(pool, budget), knapsack(pool, 12), every_kth(index))
        outcomes = [best_that_fits(index, policy, budget) for policy in candidates]
        outcomes.append(restricted(pool, lambda _, decision: not decision, budget))
        for outcome in outcomes:
            if outcome is not None:
                assert outcome.simulation.peak_bytes <= budget
                assert simulate(index, outcome.decisions).step_ms == outcome.simulation.step_ms
                assert outcome.simulation.step_ms >= best_ms - 1e-6
                slower += outcome.simulation.step_ms > best_ms + 1e-6
    assert slower >= 3


def test_every_kth_region_drops_everything() -> None:
    index = ProfileIndex(profile_of([chain_template(2)], [0] * 5))
    patterns = ["".join("x" if d is not None else "." for d in decisions) for decisions in every_kth(index)]
    assert patterns == [".....", "x....", "x...x", "x..x.", "x.x.x", "xxxxx"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_without_classes_nothing_changes_but_the_time() -> None:
    pytest.importorskip("torch")
    from benchmarks.ablation import without_classes

    profile = gpt_profile(3, width=64, tokens=16)
    budget = Solver(profile).plain(0).predicted_peak_bytes * 6 // 10
    plans = [Solver(variant).solve(budget) for variant in (profile, without_classes(profile))]
    bounds = [plan.lower_bound_ms for plan in plans]
    assert plans[1].predicted_step_ms == pytest.approx(plans[0].predicted_step_ms, rel=0.005)
    assert max(bounds) <= min(plan.predicted_step_ms for plan in plans) + 1e-6


def test_only_leaves_the_rest_untouched() -> None:
    profile = profile_of([chain_template(3)], [0, 0, 0], mode_ms=0.1, tape_ms=0.1)
    alone = only(profile, 1, 1)
    alone.check()
    index = ProfileIndex(alone)
    assert [bool(facts.slots) for facts in index.facts] == [False, True, False]
    nothing = [None] * 3
    assert simulate(index, nothing).peak_bytes == simulate(ProfileIndex(profile), nothing).peak_bytes
    assert replace(alone, ops=profile.ops, regions=profile.regions) == replace(
        profile, mode_ms_per_op=0.0, tape_ms_per_op=0.0
    )
