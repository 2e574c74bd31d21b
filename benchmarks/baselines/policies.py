"""Simple policies, each evaluated by tightfit's own simulator: what a user might do without a solver of peaks.

Every policy is a row of candidates, from the gentlest on; the fastest one whose simulated peak fits is its plan.  So a
policy never breaks the budget, and is charged only for what it does not know.

* `every_kth`: drop everything in every k-th region (Chen et al. 2016, "Training deep nets with sublinear memory cost",
  arXiv:1604.06174, at one level).
* `greedy`: the exchange that costs the fewest milliseconds for each byte no longer held, again and again.
* `knapsack`: least replay time with the sum of held bytes at most B; B goes down until the simulated peak fits. This
  is what solvers of *retained* bytes do (torch's `sac_ilp` within a module, and selective checkpointing by a knapsack).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tightfit.records import Decision, Profile
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import Simulation, simulate
from tightfit.solver.column_generation import ENUMERATE_AT_MOST, ColumnPool
from tightfit.solver.columns import Column, ColumnSource
from tightfit.solver.highs import INFINITY, Program
from tightfit.solver.master import Master

#: Limits on the sum of held bytes that the knapsack tries, evenly from all to nothing.
KNAPSACK_STEPS = 60

#: Whether a region of a class may take a decision.
Allowed = Callable[[int, Decision], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A policy's plan for a budget."""

    decisions: list[Decision | None]
    simulation: Simulation


def make_pool(profile: Profile, enumerate_at_most: int = ENUMERATE_AT_MOST) -> ColumnPool:
    """The columns that tightfit's solver chooses among; or more, where it would not enumerate a class."""
    structure = ColumnPool(ColumnSource(ProfileIndex(profile.with_unit_times())))
    return ColumnPool(ColumnSource(ProfileIndex(profile)), structure, enumerate_at_most)


def best_that_fits(
    index: ProfileIndex, candidates: Iterable[list[Decision | None]], budget_bytes: int
) -> Outcome | None:
    """The fastest candidate whose simulated peak is within the budget."""
    best: Outcome | None = None
    for decisions in candidates:
        walked = simulate(index, decisions)
        if walked.peak_bytes <= budget_bytes and (best is None or walked.step_ms < best.simulation.step_ms):
            best = Outcome(decisions=decisions, simulation=walked)
    return best


def every_kth(index: ProfileIndex) -> Iterator[list[Decision | None]]:
    """Nothing dropped; then, for each k, everything in regions 0, k, 2k, ... of those that may drop."""
    droppable = [region for region, facts in enumerate(index.facts) if facts.slots]
    yield [None] * len(index.facts)
    for k in range(len(droppable), 0, -1):
        chosen = set(droppable[::k])
        yield [BY_VALUE.decide(()) if region in chosen else None for region in range(len(index.facts))]


def greedy(pool: ColumnPool, budget_bytes: int) -> Iterator[list[Decision | None]]:
    """From nothing dropped, by the exchange of least added ms for each byte of less held, until the peak fits.

    It sees held bytes only, as does the knapsack: where the peak is something else, it goes on in vain.
    """
    source, master = pool.source, pool.master
    classes = [region.class_id for region in source.index.profile.regions]
    chosen = [source.column(region, None) for region in range(len(classes))]
    while True:
        yield [column.decision for column in chosen]
        if source.peaks([(column, 1.0) for column in chosen]).max() <= budget_bytes:
            return
        best: tuple[float, int] | None = None
        exchange: Column | None = None
        for region, now in enumerate(chosen):
            for decision in master.decisions[classes[region]]:
                column = source.column(region, decision)
                saved_bytes = now.held_bytes - column.held_bytes
                if saved_bytes <= 0:
                    continue
                key = ((column.overhead_ms - now.overhead_ms) / saved_bytes, -saved_bytes)
                if best is None or key < best:
                    best, exchange = key, column
        if exchange is None:
            return
        chosen[exchange.region] = exchange


def knapsack(pool: ColumnPool, steps: int = KNAPSACK_STEPS) -> Iterator[list[Decision | None]]:
    """Least added time with at most B held bytes in sum, for B from what nothing dropped holds down to the least."""
    source, master = pool.source, pool.master
    classes = [region.class_id for region in source.index.profile.regions]
    columns = [[source.column(r, decision) for decision in master.decisions[c]] for r, c in enumerate(classes)]
    most = sum(max(column.held_bytes for column in of_region) for of_region in columns)
    least = sum(min(column.held_bytes for column in of_region) for of_region in columns)
    for step in range(steps + 1):
        limit_bytes = most - (most - least) * step // steps
        program = Program()
        held: dict[int, float] = {}
        numbers = []
        for of_region in columns:
            variables = [program.variable(column.overhead_ms, 1.0, integer=True) for column in of_region]
            program.row(dict.fromkeys(variables, 1.0), 1.0, 1.0)
            for variable, column in zip(variables, of_region, strict=True):
                if column.held_bytes:
                    held[variable] = float(column.held_bytes)
            numbers.append(variables)
        program.row(held, -INFINITY, limit_bytes)
        solution = program.solve()
        if solution is None:
            continue
        yield [
            max(zip(variables, of_region, strict=True), key=lambda pair: solution.values[pair[0]])[1].decision
            for variables, of_region in zip(numbers, columns, strict=True)
        ]


def restricted(pool: ColumnPool, allowed: Allowed, budget_bytes: int) -> Outcome | None:
    """tightfit's own exact choice among those of its columns that are allowed; None if none of them fits."""
    master = Master(pool.source)
    for class_id, decisions in pool.master.decisions.items():
        for decision in decisions:
            if decision is not None and allowed(class_id, decision):
                master.offer(class_id, decision)
    found = master.fastest(budget_bytes, 1e-9 * max(1.0, pool.source.index.profile.plain_step_ms))
    if found is None:
        return None
    decisions, _ = found
    return Outcome(decisions=decisions, simulation=simulate(pool.source.index, decisions))
