"""Compute a lower bound on the added time of every plan within a budget.

Lagrangian relaxation of the memory rows (Geoffrion 1974): at any prices of bytes at moments, no plan is faster than

    sum over regions of (the least cost of a decision at these prices) - sum over moments of price x bytes to spare

where time is a mean of the ways that it may take (`time_cuts`), none of which is longer than the step.

The least cost of a region is exact where all its choices of values are enumerated.  Elsewhere it is bounded from below
by the minimum cut of `pricing` and, where that leaves much room, by the program of `region_mip`; what other levers
offer is evaluated as it is.  So the bound holds for every plan of the plan space, generated or not.
"""

from __future__ import annotations

from tightfit.solver.column_generation import ColumnPool
from tightfit.solver.effort import Effort
from tightfit.solver.pricing import Prices

#: The minimum cut is good enough where it leaves less than this part of the plain step open.
_LOOSE = 1e-4


def added_ms_bound(pool: ColumnPool, prices: Prices, budget_bytes: int, effort: Effort) -> float:
    """Return a time that no plan within the budget adds less than (at least 0): the lower, the less effort is left."""
    source = pool.source
    loose_ms = _LOOSE * source.index.plain_step_ms
    spare = sum(price * (budget_bytes - source.base[time]) for time, price in prices.private.items())
    total = sum(weight * source.cuts.base_ms(cut) for cut, weight in prices.times.items()) - spare
    magnitude = abs(spare)
    for class_id, members in pool.members.items():
        for regions in pool.alike(members, prices):
            region = regions[0]
            cost = known = pool.least_known(region, prices)
            if class_id not in pool.enumerated and pool.may_drop(region):
                cost = pool.model(region).best(prices)[0]
                is_loose = len(regions) * (known - cost) > loose_ms and not effort.is_spent
                if is_loose and pool.program(region).usable:
                    cost = max(cost, pool.program(region).bound(prices, effort, loose_ms / len(regions))[0])
                cost = min(cost, pool.least_listed(region, prices))
            total += len(regions) * cost
            magnitude += len(regions) * abs(cost)
    return max(0.0, total - 1e-9 * magnitude)  # rounding of floats, against ourselves
