"""What a chart shows, without saying how it is drawn: in a page as SVG, in a file by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

Point = tuple[float, float]

#: Points drawn of one line, at most: more cannot be told apart.
MOST_POINTS = 600


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    points: Sequence[Point]
    """(step, value), by step."""
    of_many: Callable[[Sequence[float]], float] = max
    """Combines the values of neighbours where there are too many to draw."""
    holds: bool = False
    """A value holds until the next point: the curve goes in steps."""
    is_bound: bool = False
    """It bounds another line: drawn dashed, without dots."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """One layer of a stack, on top of those before it."""

    name: str
    values: Sequence[float]
    """One for each of `Chart.stack_x`."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A line across the chart, such as a budget."""

    name: str
    value: float
    is_upright: bool = False
    """It stands at an x, instead of lying at a y."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One point that matters, with its name."""

    name: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines, or layers that add up, over one axis."""

    name: str
    """A file's name for it."""
    title: str
    x_name: str = "step"
    y_name: str = ""
    """The unit of its values; empty for plain numbers."""
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = ()
    stack_x: Sequence[float] = ()
    """Where each column of the stack begins."""
    stack_end: float = 0.0
    """Where the last column ends."""
    levels: Sequence[Level] = ()
    marks: Sequence[Mark] = ()
    show: Callable[[float], str] = "{:g}".format
    """A value as text."""
    x_range: tuple[float, float] | None = None
    """What the horizontal axis reaches at least, so that two charts can be compared."""
    y_range: tuple[float, float] | None = None
    """The same of the vertical one."""

    @property
    def drawn_lines(self) -> list[Line]:
        """The lines with their finite points, thinned to what can be told apart; those without any are left out."""
        return [replace(line, points=points) for line in self.lines if (points := _thinned(line))]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.drawn_lines and not self.stack_x

    @property
    def stacked(self) -> list[list[float]]:
        """The upper edge of each band, by column; they never fall from one band to the next."""
        edges: list[list[float]] = []
        below = [0.0] * len(self.stack_x)
        for band in self.bands:
            below = [edge + max(value, 0.0) for edge, value in zip(below, band.values, strict=True)]
            edges.append(below)
        return edges

    @property
    def x_span(self) -> tuple[float, float]:
        """The first and the last x."""
        xs = [x for line in self.drawn_lines for x, _ in line.points] + [mark.x for mark in self.marks]
        xs += [level.value for level in self.levels if level.is_upright]
        xs += [*self.stack_x, *([self.stack_end] if self.stack_x else []), *(self.x_range or ())]
        return min(xs), max(xs)

    @property
    def y_span(self) -> tuple[float, float]:
        """The lowest and the highest y, those of levels and marks included; a stack begins at zero."""
        ys = [y for line in self.drawn_lines for _, y in line.points] + [mark.y for mark in self.marks]
        ys += [level.value for level in self.levels if not level.is_upright]
        ys += [*(self.y_range or ()), *([0.0, *self.stacked[-1]] if self.stack_x and self.bands else [])]
        return min(ys), max(ys)


def path_of(line: Line) -> list[Point]:
    """Return the corners of a line: where its values hold, each until the next point."""
    points = list(line.points)
    if not line.holds:
        return points
    corners = points[:1]
    for (_, before), (x, y) in pairwise(points):
        corners += [(x, before), (x, y)]
    return corners


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from at most `low` to at least `high`, about `count` of them."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-99):  # the same, as far as a chart can show
        high = low + (abs(low) if abs(low) > 1e-90 else 1.0)
    rough = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _thinned(line: Line) -> list[Point]:
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    size = math.ceil(len(finite) / MOST_POINTS)
    if size <= 1:
        return finite
    pieces = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(piece[-1][0], line.of_many([y for _, y in piece])) for piece in pieces]
