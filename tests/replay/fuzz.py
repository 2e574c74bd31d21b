"""`make fuzz`: many random modules, each plain and under a random plan: equal bits, and a peak within the budget.

    python -m tests.replay.fuzz --count 2000 --seed 1 --processes 2
    python -m tests.replay.fuzz --replay '{"code": ...}'      # one failing program again, as it was printed

Every module is measured, gets a plan (a budget between the smallest and the plain peak, random decisions, or all that
can be dropped), is repaired like `fit` does if its guarded step took more than predicted, and is then run several steps
in both ways.  Losses may reach beyond the model, and one graph may see several backwards.  Counted as failures: any
loss, gradient, parameter, buffer, random state or Python counter that differs; an error that plain does not raise (and
the reverse); a measured peak above the budget after repair.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch._functorch import config as functorch

import tightfit
from tests.replay.helpers import differences
from tests.replay.programs import SLOPES, Program, programs
from tests.replay.step_kinds import BACKWARDS, LOSSES, LossOf
from tests.replay.steps import steps
from tests.support import fixed_costs
from tightfit import Plan, Profile
from tightfit.device import memory as meter
from tightfit.planning.trial_repair import without_refused
from tightfit.records import Decision
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver import column_generation
from tightfit.solver.columns import keeping
from tightfit.solver.plan_builder import build_plan
from tightfit.solver.solver import Solver, full_plan
from tightfit.step.step import Step

KINDS = ("budget", "budget", "budget", "random", "full")
ROUNDS = 4
#: Fewer ways of one region than the solver tries for users: that plans are carried out right is asked, not how fast
#: they are.
_ENUMERATE_AT_MOST = 150


@dataclass
class Outcome:
    """What became of one module."""

    spec: dict[str, Any]
    kind: str = ""
    method: str = ""
    unequal: str = ""
    over_budget: str = ""
    error: str = ""
    refused_by_plain: bool = False
    dropped: int = 0
    repairs: int = 0
    excess_before: int = 0
    ratio_before: float = 1.0
    """Measured peak / predicted peak before any repair."""

    @property
    def failed(self) -> bool:
        return bool(self.unequal or self.over_budget or self.error)


def decisions(index: ProfileIndex, draw: random.Random) -> list[Decision | None]:
    found: list[Decision | None] = []
    for facts in index.facts:
        kept = keeping(index, [v for v in sorted(facts.optional) if draw.random() < 0.5])
        found.append(None if draw.random() < 0.3 else kept)
    return found


def choose(profile: Profile, kind: str, share: float, draw_seed: int) -> Plan:
    """A plan. For other kinds than "budget", its own prediction is the budget that it is held to."""
    if kind == "full":
        plan = full_plan(profile, 2**50)
    elif kind == "random":
        index = ProfileIndex(profile)
        plan = build_plan(index, decisions(index, random.Random(draw_seed)), 2**50)
    else:
        solver = Solver(profile)
        lowest = solver.minimum_budget()[0]
        highest = solver.plain(2**50).predicted_peak_bytes
        return solver.solve(lowest + int(share * max(0, highest - lowest)))
    return replace(plan, budget_bytes=plan.predicted_peak_bytes)


def measured_peak(
    model: Program, applied: tightfit.Applied, loss_of: LossOf | None = None, backwards: str = "once"
) -> int:
    """Peak of one forward and backward, gradients resident as in every step but the first."""
    used = loss_of if loss_of is not None else LOSSES["plain"](model)
    model.reset()
    for parameter in (*model.parameters(), *used.beside.parameters()):
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    batch = model.batch

    def step() -> None:
        with applied.step():
            loss = used.function(model, batch)
        BACKWARDS[backwards](model, loss)

    return meter.measure_peak(step, meter.resident_bytes(model, batch))[1]


def check(spec: dict[str, Any]) -> Outcome:
    """Run one module."""
    outcome = Outcome(spec, kind=spec["kind"])
    try:
        _check(spec, outcome)
    except Exception:
        outcome.error = traceback.format_exc()
    return outcome


def _check(spec: dict[str, Any], outcome: Outcome) -> None:
    model = Program([tuple(entry) for entry in spec["code"]], spec["rows"], spec["columns"], spec["form"])
    model.slope = spec.get("slope", "")
    loss_of = LOSSES[spec.get("loss", "plain")](model)
    backwards = spec.get("backwards", "once")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state_beside = loss_of.state()
    run = partial(steps, model, model.batch, count=2, loss_of=loss_of, backwards=backwards)
    plain = run()
    outcome.refused_by_plain = isinstance(plain, str)
    model.reset()
    try:
        step = Step(loss=loss_of.function, retain_graph=backwards != "once")
        profile = tightfit.measure(model, model.batch, step=step)
    except RuntimeError:
        if not outcome.refused_by_plain:
            raise
        return  # measuring runs the step, which plain refuses
    outcome.method = profile.method
    for _ in range(ROUNDS):
        model.load_state_dict(state)
        loss_of.beside.load_state_dict(state_beside)
        model.reset()
        plan = choose(profile, spec["kind"], spec["share"], spec["draw"])
        outcome.dropped = sum(len(plan.recipes[r.recipe].drop) for r in plan.regions if r.recipe >= 0)
        with tightfit.apply(model, plan) as applied:
            planned = run(applied)
            if outcome.refused_by_plain or isinstance(planned, str):
                outcome.unequal = "" if planned == plain else f"plain: {name_of(plain)}, planned: {name_of(planned)}"
                return
            assert not isinstance(plain, str)
            found = differences(plain, planned)
            if found:
                outcome.unequal = ", ".join(found)
                return
            torch.manual_seed(0)
            peak_bytes = measured_peak(model, applied, loss_of, backwards)
            refused = applied.refused
        if outcome.repairs == 0:
            outcome.excess_before = peak_bytes - plan.predicted_peak_bytes
            outcome.ratio_before = peak_bytes / plan.predicted_peak_bytes
        if refused:
            profile = without_refused(profile, refused)
        elif peak_bytes > plan.budget_bytes:
            excess = peak_bytes - plan.predicted_peak_bytes
            correction = profile.correction_bytes + max(excess, peak_bytes - plan.budget_bytes)
            profile = replace(profile, correction_bytes=correction)
        else:
            return
        outcome.repairs += 1
    outcome.over_budget = f"measured {peak_bytes}, budget {plan.budget_bytes}, predicted {plan.predicted_peak_bytes}"


def name_of(result: Any) -> str:
    return result if isinstance(result, str) else "no error"


def backwards_of(program: Program) -> tuple[str, ...]:
    """The kinds of backward that plain PyTorch takes, too: where a plan takes a checkpoint over, it takes more."""
    names = [name for name, _, _ in program.code]
    if "selective checkpoint" in names:
        return ("once",)
    return ("once", "twice") if any("reentrant" in name for name in names) else tuple(BACKWARDS)


def slopes_of(program: Program) -> tuple[str, ...]:
    """The kinds of backward inside forward that plain PyTorch takes, too: not through every checkpoint."""
    names = [name for name, _, _ in program.code]
    refused = any("reentrant" in name or name == "selective checkpoint" for name in names)
    return ("",) if refused else tuple(SLOPES)


@st.composite
def specs(draw: st.DrawFn, *, rows: int = 16, columns: int = 64) -> dict[str, Any]:
    program = draw(programs(rows=rows, columns=columns, further=True))
    return {
        "code": program.code,
        "rows": rows,
        "columns": columns,
        "form": program.form,
        "slope": draw(st.sampled_from(slopes_of(program))),
        "loss": draw(st.sampled_from(("plain", "plain", *LOSSES))),
        "backwards": draw(st.sampled_from(("once", "once", *backwards_of(program)))),
        "kind": draw(st.sampled_from(KINDS)),
        "share": draw(st.integers(0, 20)) / 20,
        "draw": draw(st.integers(0, 2**16)),
    }


def prepare() -> None:
    """One thread, fixed costs, and compiled functions whose graph may see several backwards."""
    torch.set_num_threads(1)
    fixed_costs.install()
    column_generation.ENUMERATE_AT_MOST = _ENUMERATE_AT_MOST
    functorch.donated_buffer = False


def silence() -> None:
    """The profiler's library writes a line at each start; failures come back as text, not through stderr."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def for_each_module(number: int, count: int, look: Callable[[dict[str, Any]], object]) -> None:
    """Call `look` with the specs of `count` modules drawn from `number`, in this process."""
    prepare()
    gc.collect()
    gc.freeze()  # measuring collects garbage: let it not walk over all that was imported
    drawn = 0

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def run(spec: dict[str, Any]) -> None:
        nonlocal drawn
        if drawn < count:
            drawn += 1
            look(spec)

    run()


def work(job: tuple[int, int]) -> list[Outcome]:
    """`count` modules drawn from `number`."""
    number, count = job
    outcomes: list[Outcome] = []
    for_each_module(number, count, lambda spec: outcomes.append(check(spec)))
    return outcomes


def show_failures(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.failed:
            print(f"FAILED {json.dumps(outcome.spec)}")
            print(
                f"  {outcome.unequal and 'unequal: ' + outcome.unequal}{outcome.over_budget}{outcome.error}", flush=True
            )


def report(outcomes: list[Outcome], seconds: float) -> int:
    """Print the figures and one summary line; the exit code."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    measured = [outcome for outcome in outcomes if outcome.method]
    ratios = sorted(outcome.ratio_before for outcome in measured) or [1.0]
    for outcome in sorted(measured, key=lambda o: -o.ratio_before)[:3]:
        if outcome.ratio_before > 1.01:
            print(f"under-predicted, {outcome.ratio_before:.4f}: {json.dumps(outcome.spec)}")
    kinds = Counter(outcome.kind for outcome in outcomes)
    for line in (
        f"{len({json.dumps(outcome.spec['code']) for outcome in outcomes})} distinct programs in {seconds:.0f} s",
        f"{kinds['budget']} at a budget, {kinds['random']} random decisions, {kinds['full']} with all dropped",
        f"{sum(bool(o.spec['slope']) for o in outcomes)} with a backward inside forward",
        f"{sum(o.method == 'real' for o in outcomes)} measured with a real step",
        f"{sum(o.refused_by_plain for o in outcomes)} refused by plain and by the engine",
        f"{sum(o.dropped for o in outcomes)} values dropped",
        f"measured / predicted peak before repair: median {ratios[len(ratios) // 2]:.4f}, from {ratios[0]:.4f} to "
        f"{ratios[-1]:.4f}; {sum(o.repairs > 0 for o in outcomes)} repaired",
    ):
        print(f"  {line}")
    print(
        f"fuzz: {len(outcomes)} modules run, {sum(bool(o.unequal) for o in outcomes)} unequal, "
        f"{sum(bool(o.over_budget) for o in outcomes)} over budget, {sum(bool(o.error) for o in outcomes)} errors"
    )
    return 1 if failed or not outcomes else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="modules to run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--replay", help="a program as it was printed")
    options = parser.parse_args()
    start = time.monotonic()
    if options.replay:
        prepare()
        outcomes: list[Outcome] = [check(json.loads(options.replay))]
        show_failures(outcomes)
        return report(outcomes, time.monotonic() - start)
    size = max(1, min(25, options.count // options.processes))
    jobs = [
        (options.seed * 100_003 + number, min(size, options.count - number * size))
        for number in range(-(-options.count // size))
    ]
    outcomes = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, initializer=silence, maxtasksperchild=8) as pool:
        for done in pool.imap_unordered(work, jobs):
            outcomes += done
            show_failures(done)
            bad = sum(outcome.failed for outcome in outcomes)
            print(f"{len(outcomes)} of {options.count} modules, {bad} failed", file=sys.stderr, flush=True)
    return report(outcomes, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
