"""A chart as inline SVG, coloured by the style sheet of the page that it is in."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from tightfit.report.charts import Chart, Level, nice_ticks, path_of

#: So narrow that its text is still readable on a phone, where the whole is scaled down.
WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 26, 36
#: Above this share of the width, a mark's name stands to its left.
_RIGHT_SHARE = 0.6
#: What a line of text takes, and each of its letters: names must not lie over each other.
_TEXT_HEIGHT, _LETTER_WIDTH = 14, 6.4
#: Above the highest value there is so much of the axis, or less where a round number comes before.
_HEADROOM = 0.15
#: A line of so few points shows each; of more, only the one that is pointed at.
_FEW_POINTS = 12

_Place = Callable[[float], float]
#: x, y and `text-anchor` of a text.
_Anchor = tuple[float, float, str]


class _Names:
    """Texts within the drawing, each placed where it lies over none before it."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float, float]] = []  # from x to x, at y

    def place(self, kind: str, text: str, *places: _Anchor) -> str:
        """Return the text at the first of these places that is free; at the first of all where none is."""
        width = len(text) * _LETTER_WIDTH
        found = [(place, self._extent(place, width)) for place in places]
        (x, y, anchor), extent = next((one for one in found if self._is_free(one[1])), found[0])
        self._taken.append(extent)
        return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

    def _extent(self, place: _Anchor, width: float) -> tuple[float, float, float]:
        x, y, anchor = place
        return (x - width, x, y) if anchor == "end" else (x, x + width, y)

    def _is_free(self, extent: tuple[float, float, float]) -> bool:
        first, last, y = extent
        return (
            first >= 0
            and last <= WIDTH
            and not any(
                first < other_last and other_first < last and abs(y - other_y) < _TEXT_HEIGHT
                for other_first, other_last, other_y in self._taken
            )
        )


def _beside(x: float, *heights: float, gap: float) -> list[_Anchor]:
    """Return the places right and left of a point at these heights; far to the right, those to its left first."""
    sides: list[tuple[float, str]] = [(x + gap, "start"), (x - gap, "end")]
    if x > _LEFT + _RIGHT_SHARE * (WIDTH - _LEFT):
        sides.reverse()
    return [(at, y, anchor) for y in heights for at, anchor in sides]


def svg_chart(chart: Chart) -> str:
    """Draw the chart with its legend; empty if there is nothing finite to draw."""
    if chart.is_empty:
        return ""
    first, last = chart.x_span
    lowest, highest = chart.y_span
    ticks = nice_ticks(lowest, highest)
    low = min(ticks[0], lowest)
    high = max(highest, min(ticks[-1], highest + _HEADROOM * (highest - low)) if highest > low else ticks[-1])
    ticks = [tick for tick in ticks if tick <= high]

    def across(x: float) -> float:
        share = (x - first) / (last - first) if last > first else 0.5  # a single point stands in the middle
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _TOP + (high - y) / ((high - low) or 1) * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">']
    parts += _axes(chart, ticks, across, down)
    parts += _bands(chart, across, down)
    names = _Names()
    parts += _levels(chart, across, down, names)
    parts += _lines(chart, across, down, names)
    parts += _marks(chart, across, down, names)
    parts.append("</svg>")
    return "".join(parts) + _legend(chart)


def _axes(chart: Chart, ticks: list[float], across: _Place, down: _Place) -> list[str]:
    parts = []
    if chart.y_name:
        parts.append(f'<text class="tick" x="0" y="12">{escape(chart.y_name)}</text>')
    for tick in ticks:
        y = down(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(chart.show(tick))}</text>'
        )
    first, last = chart.x_span
    whole = all(x == int(x) for line in chart.drawn_lines for x, _ in line.points) and not chart.stack_x
    xs = [first] if first == last else [tick for tick in nice_ticks(first, last) if first <= tick <= last]
    name = f" {chart.x_name}"
    for x in xs if not whole else [x for x in xs if x == int(x)]:
        parts.append(f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{x:,.10g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(name)}</text>')
    return parts


def _bands(chart: Chart, across: _Place, down: _Place) -> list[str]:
    if not chart.stack_x:
        return []
    ends = [*chart.stack_x[1:], chart.stack_end]
    below = [0.0] * len(ends)
    parts = []
    for place, (band, edge) in enumerate(zip(chart.bands, chart.stacked, strict=True)):
        if edge != below:
            columns = list(zip(chart.stack_x, ends, below, edge, strict=True))
            corners = [(x, y) for begin, end, _, top in columns for x, y in ((begin, top), (end, top))]
            corners += [(x, y) for begin, end, base, _ in reversed(columns) for x, y in ((end, base), (begin, base))]
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in corners)
            most = chart.show(max(band.values))
            title = escape(f"{band.name}: at most {most} {chart.y_name}".rstrip())
            parts.append(f'<polygon class="band{place}" points="{path}"><title>{title}</title></polygon>')
        below = edge
    return parts


def _levels(chart: Chart, across: _Place, down: _Place, names: _Names) -> list[str]:
    parts = []
    for level in sorted(chart.levels, key=lambda level: -level.value):
        text = _name_of(level, chart)
        if level.is_upright:
            x = across(level.value)
            parts.append(
                f'<line class="upright" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
                + names.place("tick", text, *_beside(x, _TOP - 6, _TOP + 10, gap=5))
            )
            continue
        y = down(level.value)
        ends = ((WIDTH - _RIGHT, "end"), (_LEFT + 4, "start"))
        parts.append(
            f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            + names.place("level-name", text, *((x, at, anchor) for x, anchor in ends for at in (y - 5, y + 14)))
        )
    return parts


def _name_of(level: Level, chart: Chart) -> str:
    return level.name if level.is_upright else f"{level.name} {chart.show(level.value)} {chart.y_name}".rstrip()


def _lines(chart: Chart, across: _Place, down: _Place, names: _Names) -> list[str]:
    parts = []
    for place, line in enumerate(chart.drawn_lines):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in path_of(line))
        parts.append(f'<polyline class="line line{place}{" bound" if line.is_bound else ""}" points="{path}"/>')
        if line.is_bound:
            continue
        shown = " shown" if len(line.points) <= _FEW_POINTS else ""
        for x, y in line.points:
            text = escape(f"{line.name}, {chart.x_name} {x:,.10g}: {chart.show(y)} {chart.y_name}".rstrip())
            parts.append(
                f'<circle class="dot{shown} line{place}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.5">'
                f"<title>{text}</title></circle>"
            )
        if len(line.points) == 1:  # no curve to read it from
            ((x, y),) = line.points
            value = f"{chart.show(y)} {chart.y_name}".rstrip()
            parts.append(names.place("mark-name", value, *_beside(across(x), down(y) + 4, down(y) + 20, gap=9)))
    return parts


def _marks(chart: Chart, across: _Place, down: _Place, names: _Names) -> list[str]:
    parts = []
    for mark in chart.marks:
        x, y = across(mark.x), down(mark.y)
        heights = (max(y - 8, _TOP - 8), y + 16, y + 32)
        parts.append(
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            + names.place("mark-name", mark.name, *_beside(x, *heights, gap=9))
        )
    return parts


def _legend(chart: Chart) -> str:
    used = [(f"band{place}", band.name) for place, band in enumerate(chart.bands) if any(band.values)]
    lines = chart.drawn_lines
    used += [(f"line{place}{' bound' if line.is_bound else ''}", line.name) for place, line in enumerate(lines)]
    if len(used) < 2:  # the title says it
        return ""
    keys = [f'<span class="key {kind}">{escape(name)}</span>' for kind, name in used]
    return f'<p class="legend">{" ".join(keys)}</p>'
