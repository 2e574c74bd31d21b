"""A lower bound on the added time of every plan within a budget.

Lagrangian relaxation of the memory rows (Geoffrion 1974): at any prices of bytes at moments, no plan is faster than

    sum over regions of (the least cost of a decision at these prices) - sum over moments of price x bytes to spare.

The least cost of a region is exact where its keep sets are enumerated, and bounded from below by the minimum cut of
`pricing` elsewhere, so the bound holds for every plan of the plan space, generated or not.
"""

from __future__ import annotations

from recollect.solve.generate import Pool
from recollect.solve.pricing import Prices


def added_ms_bound(pool: Pool, prices: Prices, budget_bytes: int) -> float:
    """No plan within the budget adds less time than this (at least 0)."""
    source = pool.source
    spare = sum(price * (budget_bytes - source.base[time]) for time, price in prices.private.items())
    total = -spare
    magnitude = abs(spare)
    for class_id, members in pool.members.items():
        for regions in pool.alike(members, prices):
            region = regions[0]
            if class_id in pool.enumerated or not pool.may_drop(region):
                cost = min(
                    pool.cost(source.column(region, decision), prices) for decision in pool.master.decisions[class_id]
                )
            else:
                cost = pool.model(region).best(prices)[0]
            total += len(regions) * cost
            magnitude += len(regions) * abs(cost)
    return max(0.0, total - 1e-9 * magnitude)  # rounding of floats, against ourselves
