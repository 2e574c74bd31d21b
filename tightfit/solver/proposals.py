"""What a search proposes for one region: the lower hull of time against held bytes, what lies between, low peaks.

The hull's vertices by bisection of slopes (Eisner & Severance 1976); between them the fastest sets within so many held
bytes (Haimes et al. 1971), or in long regions mixtures of two neighbours; and a greedy descent to low peaks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise

from tightfit.records import Decision
from tightfit.simulation.levers import BY_VALUE
from tightfit.solver.columns import ColumnSource, keeping, useful_values
from tightfit.solver.pricing import Prices, PricingModel
from tightfit.solver.region_mip import RegionProgram
from tightfit.solver.time_cuts import Cut

#: Points of the sweep over the price of held bytes, for each class.
_SWEEP_AT_MOST = 24
#: Columns evaluated in one descent, at most, and operations walked for them: what a longer region could gain is found
#: by recursive recomputation (`recursive`).
_DESCENT_AT_MOST = 240
_DESCENT_OPS_AT_MOST = 40_000


def sweep(source: ColumnSource, model: PricingModel, region: int, cut: Cut) -> Iterator[Decision | None]:
    """Yield decisions on the lower hull of a way's added time against bytes held when backward begins.

    The hull's vertices by bisection of slopes (Eisner & Severance 1976).
    """
    middle = source.index.backward_event()

    def point(price: float, weight: float) -> tuple[float, int, Decision | None]:
        shared = {(middle, storage, region): price for storage in model.shared}
        _, decision = model.best(Prices(times={cut: weight}, private={middle: price}, shared=shared))
        column = source.column(region, decision)
        return column.added_ms(cut), column.held_bytes, decision

    cheap: tuple[float, int, Decision | None] = (0.0, source.column(region, None).held_bytes, None)
    small = point(1.0, 0.0)
    yield small[2]
    spans = [(cheap, small)]
    for _ in range(_SWEEP_AT_MOST):
        if not spans:
            return
        (ms_a, bytes_a, a), (ms_b, bytes_b, b) = spans.pop(0)
        if bytes_a <= bytes_b or ms_b <= ms_a:
            continue
        price = (ms_b - ms_a) / (bytes_a - bytes_b)
        found = point(price, 1.0)
        line = ms_a + price * bytes_a
        if found[0] + price * found[1] < line * (1 - 1e-9):
            yield found[2]
            spans += [((ms_a, bytes_a, a), found), (found, (ms_b, bytes_b, b))]


def between(
    source: ColumnSource, program: RegionProgram, known: Collection[Decision | None], region: int, points: int, cut: Cut
) -> Iterator[Decision | None]:
    """Yield the fastest decisions of a region within evenly spaced numbers of bytes held when backward begins.

    `known`: what is on offer there.
    """
    middle = source.index.backward_event()
    held = [source.column(region, decision).held_bytes for decision in known]
    smallest, largest = min(held), max(held)
    most = largest
    for place in reversed(range(1, points)):
        capacity = smallest + (largest - smallest) * place // points
        if capacity >= most:
            continue  # the fastest within more bytes holds no more than these
        if source.effort.is_spent:
            return
        answer = program.within(cut, {middle: capacity}, {middle: frozenset()}, source.effort)
        if answer is not None:
            most = source.column(region, answer[1]).held_bytes
            yield answer[1]


def spliced(source: ColumnSource, known: Collection[Decision | None], region: int, points: int) -> Iterator[Decision]:
    """Yield decisions that keep what one decision keeps up to an operation, and from there on what another does.

    The steps of a loop are alike, and so is what a decision of the hull does to each: between two decisions lie
    those that treat some steps as the one, and the rest as the other.
    """
    index = source.index
    useful = frozenset(useful_values(index, region))
    record = index.profile.regions[region]
    kept = [useful if d is None else index.keep_values(region, d.kept) for d in _hull(source, known, region)]
    for fewer, more in pairwise(kept):
        for place in range(1, points):
            end = record.first_op + record.op_count * place // points
            before, after = (
                {value for value in values if (index.profile.values[value].op < end) == early}
                for values, early in ((fewer, True), (more, False))
            )
            yield keeping(index, before | after)


def _hull(source: ColumnSource, known: Collection[Decision | None], region: int) -> list[Decision | None]:
    """Return the lower hull of added time against bytes held when backward begins, from few bytes to many."""
    cut = source.cuts.first[0]
    by_value = [d for d in known if d is None or d.lever == BY_VALUE.name]
    points = sorted(
        (
            (column.held_bytes, column.added_ms(cut), place)
            for place, column in enumerate(source.column(region, decision) for decision in by_value)
        ),
    )
    hull: list[tuple[int, float, int]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    return [by_value[place] for _, _, place in hull]


def low_peaks(source: ColumnSource, region: int) -> Iterator[Decision]:
    """Yield decisions on the way to the lowest peak that the region itself reaches, from dropping all."""
    index, base = source.index, source.base
    useful = useful_values(index, region)
    window = index.events_of_region[region]

    def measure(values: frozenset[int]) -> tuple[int, int]:
        column = source.column(region, keeping(index, values))
        return max(base[time] + column.at(time)[0] for time in window), column.held_bytes

    kept: frozenset[int] = frozenset()
    best = measure(kept)
    left = tries(source, region)
    while left > 0:
        stride = max(1, len(useful) // left)
        tried = [(measure(kept | {value}), kept | {value}) for value in useful[::stride] if value not in kept]
        left -= len(tried)
        if not tried or min(tried, key=lambda t: t[0])[0][0] >= best[0]:
            return
        best, kept = min(tried, key=lambda t: t[0])
        yield keeping(index, kept)


def tries(source: ColumnSource, region: int) -> int:
    """Return how many columns one descent may evaluate."""
    op_count = source.index.profile.regions[region].op_count
    return min(_DESCENT_AT_MOST, 1 + _DESCENT_OPS_AT_MOST // max(1, op_count))


def _is_above(point: tuple[int, float, int], left: tuple[int, float, int], right: tuple[int, float, int]) -> bool:
    """Return whether a point (bytes, ms) lies above the line between two others."""
    return (point[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (point[0] - left[0])
