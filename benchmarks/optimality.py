"""How far tightfit's plans are from optimal: its own bound, Checkmate's optimum, and the time to solve.

    python -m benchmarks.optimality [MODEL ...] [--size tiny] [--time-limit 60] [--output FILE.md]

Everything is under the model (predicted times and bytes).  Budgets lie between the smallest one-level peak (0 %) and
the plain peak (100 %).

1. *Gap*: the plan's added time, the bound that the plan reports, and their distance in percent of the plan's step.
   *Optimum*: with every decision of the plan space on offer, where no class has more than 2^13 keep sets.
   *More columns*: the same exact choice among regions, with the keep sets of Checkmate's optima of single regions (at
   `COLUMN_BUDGETS` budgets for each class that is not enumerated) on offer beside the solver's own columns.
2. *One block*: only the region that saves most may drop anything, and the mechanism costs nothing.  Checkmate
   (`benchmarks/baselines/checkmate.py`) has the larger plan space, so its optimum is never slower than a plan at one
   level.  Where it is faster, what it holds at the end of forward is given to tightfit's simulator as a keep set: if
   that fits and is as fast, the plan was in tightfit's space and the solver missed it; otherwise the difference is
   that of the spaces.
3. *Several blocks*: the same for the four first blocks at once, under a time limit: Checkmate's best and its bound.
4. *Time to solve* chains of identical blocks.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.baselines.checkmate import Optimum, checkmate, only
from benchmarks.baselines.policies import make_pool, restricted
from benchmarks.suite_profiles import heading, suite_profile
from tests.solver.profiles import gpt_profile
from tightfit.records import Decision, Profile
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate
from tightfit.solver.column_generation import ColumnPool
from tightfit.solver.columns import keeping
from tightfit.solver.solver import Solver

MODELS = ("gpt", "llama", "bert", "vit", "resnet", "unet", "lstm")
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
ROW_SHARES = (0.5,)
#: Budgets at which Checkmate's optima of single regions give further columns.
COLUMN_BUDGETS = 12
#: Blocks of the third part.
BLOCKS = 4
CHAINS = (32, 1000)
#: Differences in ms below this are the solver's tolerance.
_SAME_MS = 1e-6


@dataclass(frozen=True, slots=True)
class Comparison:
    """tightfit and Checkmate on one row of regions at one budget."""

    share: float
    budget_bytes: int
    plan_ms: float
    bound_ms: float
    optimum: Optimum
    seconds: float
    verdict: str


def budgets_of(solver: Solver, shares: tuple[float, ...]) -> dict[float, int]:
    """Budgets between the smallest one-level peak and the plain one."""
    least_bytes = solver.smallest_at_one_level().peak_bytes
    plain_bytes = solver.plain(0).predicted_peak_bytes
    return {share: least_bytes + int((plain_bytes - least_bytes) * share) for share in shares}


def busiest(index: ProfileIndex) -> int:
    """The region with the most savings that may be dropped."""
    return max(range(len(index.facts)), key=lambda region: len(index.facts[region].slots))


def first_blocks(index: ProfileIndex, most: int = BLOCKS) -> tuple[int, int]:
    """First region and number of regions of the row that has the first blocks of the busiest region's class."""
    wanted = index.profile.regions[busiest(index)].class_id
    members = [place for place, region in enumerate(index.profile.regions) if region.class_id == wanted][:most]
    return members[0], members[-1] - members[0] + 1


def compare(
    profile: Profile, first: int, count: int, shares: tuple[float, ...], time_limit_s: float
) -> list[Comparison]:
    """tightfit against Checkmate on one row; nothing where the row has no part in the peak."""
    alone = only(profile, first, count)
    solver = Solver(alone)
    index = solver.index
    if solver.smallest_at_one_level().peak_bytes >= solver.plain(0).predicted_peak_bytes:
        return []
    found = []
    for share, budget_bytes in budgets_of(solver, shares).items():
        plan = solver.solve(budget_bytes)
        plan_ms = plan.predicted_step_ms - plan.plain_step_ms
        bound_ms = plan.lower_bound_ms - plan.plain_step_ms
        started = time.perf_counter()
        optimum = checkmate(index, first, count, budget_bytes, time_limit_s=time_limit_s)
        seconds = time.perf_counter() - started
        verdict = _verdict(index, first, count, budget_bytes, plan_ms, optimum, recursive=bool(plan.shared_tapes))
        found.append(Comparison(share, budget_bytes, plan_ms, bound_ms, optimum, seconds, verdict))
    return found


def _verdict(
    index: ProfileIndex,
    first: int,
    count: int,
    budget_bytes: int,
    plan_ms: float,
    optimum: Optimum,
    *,
    recursive: bool,
) -> str:
    if optimum.recompute_ms is None:
        return "Checkmate found no schedule"
    if abs(optimum.recompute_ms - plan_ms) <= _SAME_MS:
        return "equal" if optimum.status == "optimal" else "equal so far"
    if optimum.recompute_ms > plan_ms:
        if recursive:  # its one tape over the step also drops what a later region saves of the row's results
            return "tightfit faster: below one level, where it also drops what other regions save of the row"
        return "tightfit faster" if optimum.status == "optimal" else "tightfit faster, so far"
    decisions: list[Decision | None] = [None] * len(index.profile.regions)
    for region in range(first, first + count):
        if index.facts[region].slots:
            decisions[region] = keeping(index, optimum.held & index.facts[region].optional)
    walked = simulate(index, decisions)
    if walked.peak_bytes > budget_bytes:
        return "Checkmate faster; its keep set does not fit tightfit's replay"
    if walked.replay_ms < plan_ms - _SAME_MS:
        return f"Checkmate faster; its keep set fits tightfit at {walked.replay_ms:.3f} ms: missed by the solver"
    return "Checkmate faster; its keep set is no faster in tightfit's replay"


def _table(name: str, key: str, rows: list[Comparison]) -> list[str]:
    lines = []
    for row in rows:
        best = "-" if row.optimum.recompute_ms is None else f"{row.optimum.recompute_ms:.3f}"
        lines.append(
            f"| {name} | {key} | {row.share:.0%} | {row.budget_bytes / 2**20:.1f} | {row.plan_ms:.3f} | "
            f"{row.bound_ms:.3f} | {best} | {row.optimum.bound_ms:.3f} | {row.optimum.status} | "
            f"{row.optimum.variables} | {row.seconds:.1f} | {row.verdict} |"
        )
    return lines or [f"| {name} | {key} | | | | | | | | | | its memory is no part of the peak |"]


_HEAD = [
    "| model | regions | budget | MiB | plan ms | its bound | Checkmate ms | Checkmate's bound | status | variables "
    "| seconds | |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def checkmate_keep_sets(pool: ColumnPool, time_limit_s: float) -> dict[int, set[Decision | None]]:
    """By class, the keep sets of Checkmate's optima of its first region, for the classes that are not enumerated."""
    profile = pool.source.index.profile
    found: dict[int, set[Decision | None]] = {}
    for class_id, members in pool.members.items():
        region = members[0]
        optional = pool.source.index.facts[region].optional
        if class_id in pool.enumerated or not pool.may_drop(region):
            continue
        solver = Solver(only(profile, region, 1))
        least_bytes = solver.smallest_at_one_level().peak_bytes
        plain_bytes = solver.plain(0).predicted_peak_bytes
        for step in range(COLUMN_BUDGETS if least_bytes < plain_bytes else 0):
            budget_bytes = least_bytes + (plain_bytes - least_bytes) * step // COLUMN_BUDGETS
            optimum = checkmate(solver.index, region, 1, budget_bytes, time_limit_s=time_limit_s)
            if optimum.recompute_ms is not None:
                found.setdefault(class_id, set()).add(keeping(solver.index, optimum.held & optional))
    return found


def gaps(name: str, profile: Profile, time_limit_s: float) -> list[str]:
    """Rows of the first table."""
    solver = Solver(profile)
    pool, complete = make_pool(profile), make_pool(profile, 1 << 13)
    started = time.perf_counter()
    further = checkmate_keep_sets(pool, time_limit_s)
    seconds = time.perf_counter() - started
    for class_id, decisions in further.items():
        for decision in sorted(decisions, key=str):
            pool.master.offer(class_id, decision)
    lines = []
    for share, budget_bytes in budgets_of(solver, SHARES).items():
        plan = solver.solve(budget_bytes)
        added_ms, bound_ms = plan.predicted_step_ms - plan.plain_step_ms, plan.lower_bound_ms - plan.plain_step_ms
        gap = (plan.predicted_step_ms - plan.lower_bound_ms) / plan.predicted_step_ms
        more = _added(pool, budget_bytes, plan.plain_step_ms)
        optimum = _added(complete, budget_bytes, plan.plain_step_ms) if complete.is_complete else "-"
        lines.append(
            f"| {name} | {share:.0%} | {budget_bytes / 2**20:.1f} | {plan.plain_step_ms:.2f} | {added_ms:.3f} | "
            f"{bound_ms:.3f} | {gap:.2%} | {optimum} | {more} | {sum(map(len, further.values()))} in {seconds:.0f} s |"
        )
    return lines


def _added(pool: ColumnPool, budget_bytes: int, plain_ms: float) -> str:
    """The time that the best choice among all columns of a pool adds."""
    outcome = restricted(pool, lambda _, __: True, budget_bytes)
    return "-" if outcome is None else f"{outcome.simulation.step_ms - plain_ms:.3f}"


def solve_times(blocks: int) -> str:
    """A row of the fourth table: one chain at half of its plain peak, from nothing and at a second budget."""
    profile = gpt_profile(blocks)
    started = time.perf_counter()
    solver = Solver(profile)
    plain_bytes = solver.plain(0).predicted_peak_bytes
    plan = solver.solve(plain_bytes // 2)
    first_s = time.perf_counter() - started
    started = time.perf_counter()
    solver.solve(plain_bytes * 6 // 10)
    second_s = time.perf_counter() - started
    gap = (plan.predicted_step_ms - plan.lower_bound_ms) / plan.predicted_step_ms
    return f"| {blocks} | {len(profile.ops)} | {first_s:.1f} | {second_s:.2f} | {plan.overhead_ratio:.2%} | {gap:.3%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="How far tightfit's plans are from optimal, under the model.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"models of the suite (default: {' '.join(MODELS)})")
    parser.add_argument("--size", default="bench", choices=("tiny", "bench"))
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="for each of Checkmate's")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    profiles = {name: suite_profile(name, arguments.size) for name in arguments.models or MODELS}
    lines = heading("How far plans are from optimal", "benchmarks.optimality", arguments.size)

    def say(*more: str) -> None:
        print("\n".join(more), flush=True)
        lines.extend(more)

    say("Under the model; see `benchmarks/optimality.py` for what the columns mean.", "")
    say("## The plan and its bound", "")
    say(
        "| model | budget | MiB | plain step ms | added ms | bound | gap, of the step | optimum ms | more columns ms "
        "| columns |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    for name, profile in profiles.items():
        say(*gaps(name, profile, arguments.time_limit))
    say("", "## One block, against Checkmate's optimum, the mechanism costing nothing", "", *_HEAD)
    for name, profile in profiles.items():
        region = busiest(ProfileIndex(profile))
        key = profile.regions[region].key
        say(*_table(name, key, compare(profile, region, 1, SHARES, arguments.time_limit)))
    say("", f"## Up to {BLOCKS} blocks, {arguments.time_limit:g} s for each of Checkmate's searches", "", *_HEAD)
    for name, profile in profiles.items():
        first, count = first_blocks(ProfileIndex(profile))
        if count > 1:
            key = f"{profile.regions[first].key} to {profile.regions[first + count - 1].key}"
            say(*_table(name, key, compare(profile, first, count, ROW_SHARES, arguments.time_limit)))
    say("", "## Time to solve a chain of identical blocks, at half of its plain peak", "")
    say(
        "| blocks | operations | first budget s | second budget s | added | gap, of the step |",
        "|---|---|---|---|---|---|",
    )
    for blocks in CHAINS:
        say(solve_times(blocks))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
