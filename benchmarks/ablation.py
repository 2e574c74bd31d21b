"""What each part of the solver is worth: added time with the part taken away, under the model.

    python -m benchmarks.ablation [MODEL ...] [--size tiny] [--output FILE.md]

Figures are the predicted step's added time in percent of the plain step, from tightfit's own simulator; "-" where
nothing fits the budget.  Budgets lie between the smallest one that tightfit can run (0 %) and the plain
peak (100 %).

* *tightfit*: the full solver.
* *one level*: without plans below one level (no nests: nothing is replayed twice).
* *tapes only*: one level, and no module is run again as a whole.
* *saved only*: keep sets may name only what autograd saves, not values on the way to it.
* *all or nothing*: a region is untouched or drops everything, as with `torch.utils.checkpoint`; chosen exactly.
* *greedy*: tightfit's columns, chosen by least ms for each held byte instead of by the program.
* *knapsack*: tightfit's columns, chosen exactly under a limit on the sum of held bytes instead of the peak.
* *every k-th*: everything dropped in every k-th region, the best k.
* *rotor*: rotor's programme on the chain of regions (Beaumont et al. 2019), the fastest one-level schedule that fits.

The second table is about aggregation: the same chain with every block a class of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.baselines.policies import best_that_fits, every_kth, greedy, knapsack, make_pool, restricted
from benchmarks.baselines.rotor import chain_of, in_slots, one_level_decisions, rotor
from benchmarks.suite_profiles import heading, suite_profile
from tests.solver.profiles import gpt_profile
from tightfit.errors import BudgetInfeasible
from tightfit.records import Decision, Profile
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.solver import Solver

MODELS = ("gpt", "llama", "bert", "vit", "resnet", "unet", "lstm")
#: Budgets, in parts of the way from the smallest one to the plain peak.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)
COLUMNS = (
    "tightfit",
    "one level",
    "tapes only",
    "saved only",
    "all or nothing",
    "greedy",
    "knapsack",
    "every k-th",
    "rotor",
)
#: Blocks of the chain that is solved with and without aggregation.
CHAINS = (8, 32)
#: Sizes of memory for which rotor's programme is solved.
_ROTOR_STEPS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one budget: added ms by column, None where nothing fits."""

    share: float
    budget_bytes: int
    added_ms: dict[str, float | None]


def rotor_candidates(index: ProfileIndex) -> Iterator[list[Decision | None]]:
    """rotor's schedules for memories from all that the chain saves down; those that replay twice are left out."""
    stages, regions = chain_of(index)
    if not stages:
        return
    most_bytes = 2 * sum(stage.saved_bytes + stage.gradient_bytes for stage in stages)
    for step in range(_ROTOR_STEPS):
        scaled, memory = in_slots(stages, most_bytes * (_ROTOR_STEPS - step) // _ROTOR_STEPS, slots=100)
        schedule = rotor(scaled, memory)
        decisions = None if schedule is None else one_level_decisions(index, regions, schedule)
        if decisions is not None:
            yield decisions


def rows_of(profile: Profile) -> list[Row]:
    """Every column at every budget."""
    solver = Solver(profile)
    index = solver.index
    pool = make_pool(profile)
    least_bytes = solver.minimum_budget()[0]
    one_level_bytes = solver.smallest_at_one_level().peak_bytes
    plain_bytes = solver.plain(0).predicted_peak_bytes
    saved = {
        record.class_id: {index.local(profile.slots[s].value) for s in index.facts[region].slots}
        for region, record in enumerate(profile.regions)
    }
    by_every_kth, by_knapsack, by_rotor = list(every_kth(index)), list(knapsack(pool)), list(rotor_candidates(index))
    budgets = {share: least_bytes + int((plain_bytes - least_bytes) * share) for share in SHARES}
    rows = []
    for share, budget_bytes in budgets.items():
        added: dict[str, float | None] = {}

        def note(name: str, step_ms: float | None, added: dict[str, float | None] = added) -> None:
            added[name] = None if step_ms is None else step_ms - profile.plain_step_ms

        try:
            plan = solver.solve(budget_bytes)
        except BudgetInfeasible:
            continue
        note("tightfit", plan.predicted_step_ms)
        every = restricted(pool, lambda _, __: True, budget_bytes) if budget_bytes >= one_level_bytes else None
        outcomes = {
            "one level": every,
            "tapes only": restricted(pool, lambda _, d: d.lever == BY_VALUE.name, budget_bytes),
            "saved only": restricted(pool, lambda c, d: d.kept <= saved[c], budget_bytes),
            "all or nothing": restricted(pool, lambda _, d: not d.kept, budget_bytes),
            "greedy": best_that_fits(index, greedy(pool, budget_bytes), budget_bytes),
            "knapsack": best_that_fits(index, by_knapsack, budget_bytes),
            "every k-th": best_that_fits(index, by_every_kth, budget_bytes),
            "rotor": best_that_fits(index, by_rotor, budget_bytes),
        }
        for name, outcome in outcomes.items():
            note(name, None if outcome is None else outcome.simulation.step_ms)
        rows.append(Row(share, budget_bytes, added))
    return rows


def without_classes(profile: Profile) -> Profile:
    """The profile in which every region is a class of its own, so that nothing is solved for many at once."""
    regions = tuple(replace(region, class_id=place) for place, region in enumerate(profile.regions))
    return replace(profile, regions=regions)


def aggregation(blocks: int) -> list[str]:
    """A chain solved with and without classes: rows of the second table."""
    lines = []
    profile = gpt_profile(blocks)
    plain_bytes = Solver(profile).plain(0).predicted_peak_bytes
    for name, variant in (("yes", profile), ("no", without_classes(profile))):
        started = time.perf_counter()
        solver = Solver(variant)
        plan = solver.solve(plain_bytes // 2)
        seconds = time.perf_counter() - started
        added, bound = plan.predicted_step_ms - plan.plain_step_ms, plan.lower_bound_ms - plan.plain_step_ms
        lines.append(f"| {blocks} | {name} | {seconds:.1f} | {added:.3f} | {bound:.3f} |")
    return lines


def _percent(profile: Profile, ms: float | None) -> str:
    return "-" if ms is None else f"{100 * ms / profile.plain_step_ms:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What each part of the solver is worth, under the model.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"models of the suite (default: {' '.join(MODELS)})")
    parser.add_argument("--size", default="bench", choices=("tiny", "bench"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    lines = heading("What each part of the solver is worth", "benchmarks.ablation", arguments.size)
    lines += [
        'Added time in percent of the plain step, predicted; "-": nothing fits. `benchmarks/ablation.py` says what the',
        "columns are.",
        "",
        "| model | budget | MiB | " + " | ".join(COLUMNS) + " |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for name in arguments.models or MODELS:
        profile = suite_profile(name, arguments.size)
        for row in rows_of(profile):
            cells = " | ".join(_percent(profile, row.added_ms[column]) for column in COLUMNS)
            line = f"| {name} | {row.share:.0%} | {row.budget_bytes / 2**20:.1f} | {cells} |"
            print(line, flush=True)
            lines.append(line)
    lines += [
        "",
        "Aggregation: a chain of identical blocks (`tests/solver/profiles.py`), at half of its plain peak.",
        "",
        "| blocks | aggregated | seconds to solve | added ms | bound on added ms |",
        "|---|---|---|---|---|",
    ]
    for blocks in CHAINS:
        found = aggregation(blocks)
        print("\n".join(found), flush=True)
        lines += found
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
