"""Refine exactly where only one region has a real choice.

The columns of the pool lie near the lower hull of time against bytes.  Among many regions the points between two of
them are reached by giving some regions the one and some the other; where a single region has the choice, nothing
averages, and its best decision for the very bytes at hand is asked of its program (`region_mip`).
"""

from __future__ import annotations

import math

from tightfit.records import Decision
from tightfit.solver.column_generation import ColumnPool
from tightfit.solver.effort import Effort

#: Programs solved, at most: each time, moments that the last answer violates are added.
_ROUNDS = 12
#: Moments added at once, at most.
_MOMENTS = 4
#: Operations times moments, at most: what a larger program would gain is not worth the time it takes.
_SIZE = 6000


def refine(
    pool: ColumnPool, decisions: list[Decision | None], budget_bytes: int, effort: Effort
) -> tuple[list[Decision | None], float]:
    """Return faster decisions within the budget where just one region's are not all on offer, else those given.

    And added ms that no plan is below, where no other region has a choice at all (0: nothing new is known).
    """
    source, index = pool.source, pool.source.index
    if not source.cuts.is_single:  # the program knows but one way's time
        return decisions, 0.0
    open_regions = [
        region
        for region, record in enumerate(index.profile.regions)
        if pool.may_drop(region) and record.class_id not in pool.enumerated
    ]
    if len(open_regions) != 1 or not pool.program(open_regions[0]).usable:
        return decisions, 0.0
    region = open_regions[0]
    others = [(column, weight) for column, weight in pool.master.chosen(decisions) if column.region != region]
    room = (budget_bytes - source.peaks(others)).tolist()
    span = index.events_of_region[region]
    capacities = {time: room[time] for time in pool.master.moments if span[0] <= time <= span[-1]}
    bound_ms = 0.0
    listed = [source.column(region, decision).overhead_ms for decision in pool.listed(region)]
    listed_ms = min(listed, default=math.inf)
    alone = sum(pool.may_drop(other) for other in range(len(decisions))) == 1
    while len(capacities) * index.profile.regions[region].op_count <= _SIZE and len(capacities) <= _MOMENTS * _ROUNDS:
        held = {time: frozenset(s for column, _ in others for s in column.at(time)[1]) for time in capacities}
        if effort.is_spent:
            break
        answer = pool.program(region).within(source.cuts.first[0], capacities, held, effort)
        if answer is None:
            break
        least_ms, decision = answer
        if alone:  # and none of the capacities was lowered
            bound_ms = max(bound_ms, min(least_ms, listed_ms))
        column = source.column(region, decision)
        if column.overhead_ms >= source.column(region, decisions[region]).overhead_ms:
            break
        peaks = source.peaks([*others, (column, 1)]).tolist()
        if max(peaks) <= budget_bytes:
            return [decision if place == region else other for place, other in enumerate(decisions)], bound_ms
        for time in sorted(range(len(peaks)), key=lambda t: -peaks[t])[:_MOMENTS]:
            excess = peaks[time] - budget_bytes
            if excess > 0:
                # Where the program has looked already, something rises within the event that it does not see.
                alone &= time not in capacities
                capacities[time] = capacities[time] - excess if time in capacities else room[time]
    return decisions, bound_ms
