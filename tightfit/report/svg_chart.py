"""A line chart as inline SVG, coloured by the style sheet of the page that it is in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 680, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 16, 12, 34
#: Points drawn of one line, at most: more cannot be told apart.
_POINTS = 600


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    points: Sequence[Point]
    """(step, value), by step."""
    of_many: Callable[[Sequence[float]], float] = max
    """Combines the values of neighbours where there are too many to draw."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line, such as a budget."""

    name: str
    value: float


def line_chart(
    lines: Sequence[Line], *, levels: Sequence[Level] = (), show: Callable[[float], str] = "{:g}".format, x_name: str
) -> str:
    """Draw the chart; empty if there is no point whose value is finite.

    Args:
        lines: curves; one without such points is left out.
        levels: horizontal lines; the value axis reaches all of them.
        show: a value as text.
        x_name: what the points' first numbers are.
    """
    drawn = [Line(name=line.name, points=points) for line in lines if (points := _thinned(line))]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + [level.value for level in levels]
    ticks = nice_ticks(min(ys), max(ys))
    low, high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
    first, last = min(xs), max(xs)

    def across(x: float) -> float:
        return _LEFT + (x - first) / ((last - first) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _TOP + (high - y) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{down(tick) + 4:.1f}" text-anchor="end">{escape(show(tick))}</text>'
        )
    for tick in (tick for tick in nice_ticks(first, last) if first <= tick <= last and tick == int(tick)):
        parts.append(
            f'<text class="tick" x="{across(tick):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{int(tick):,}</text>'
        )
    parts.append(
        f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end">{escape(x_name)}</text>'
    )
    for level in levels:
        y = down(level.value)
        parts.append(
            f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="level-name" x="{_WIDTH - _RIGHT}" y="{y - 5:.1f}" text-anchor="end">'
            f"{escape(level.name)} {escape(show(level.value))}</text>"
        )
    for place, line in enumerate(drawn):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line line{place}" points="{path}"/>')
        for x, y in line.points:
            parts.append(
                f'<circle class="dot line{place}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3">'
                f"<title>{escape(f'{line.name}, {x_name} {x:g}: {show(y)}')}</title></circle>"
            )
    parts.append("</svg>")
    legend = [f'<span class="key line{place}">{escape(line.name)}</span>' for place, line in enumerate(drawn)]
    return "".join(parts) + f'<p class="legend">{" ".join(legend)}</p>'


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
    size = math.ceil(len(finite) / _POINTS)
    if size <= 1:
        return finite
    pieces = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(piece[-1][0], line.of_many([y for _, y in piece])) for piece in pieces]
