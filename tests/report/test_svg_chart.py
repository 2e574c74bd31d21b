"""Charts: every point in its place, round numbers on the axes, nothing that could break a page."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tightfit.report.svg_chart import Level, Line, line_chart, nice_ticks


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_enclose_the_values_and_are_evenly_spaced(low: float, span: float) -> None:
    assume(span == 0 or span > max(1e-3 * abs(low), 1e-90))
    high = low + span
    ticks = nice_ticks(low, high)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 8
    assert all(b - a == pytest.approx(step, rel=1e-6) for a, b in pairwise(ticks))


def parsed(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{chart}</div>")


def points(chart: str) -> list[tuple[float, float]]:
    (line,) = parsed(chart).findall(".//polyline")
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_larger_values_are_drawn_higher_and_later_ones_further_right() -> None:
    drawn = points(line_chart([Line(name="loss", points=[(1, 4.0), (10, 1.0), (20, 2.0)])], x_name="step"))
    xs, ys = zip(*drawn, strict=True)
    assert list(xs) == sorted(xs)
    assert ys[0] < ys[2] < ys[1]


def test_one_point_no_point_and_equal_points() -> None:
    assert line_chart([], x_name="step") == ""
    assert line_chart([Line(name="loss", points=[])], x_name="step") == ""
    nothing = Line(name="held out", points=[(1, math.nan), (2, math.inf)])
    assert line_chart([nothing], x_name="step") == ""
    assert len(points(line_chart([Line(name="loss", points=[(1, 2.0)]), nothing], x_name="step"))) == 1
    assert len(points(line_chart([Line(name="loss", points=[(3, 2.0)])], x_name="step"))) == 1
    assert len(points(line_chart([Line(name="loss", points=[(1, 0.0), (2, 0.0)])], x_name="step"))) == 2


def test_levels_are_inside_the_chart_and_named() -> None:
    line = Line(name="peak", points=[(1, 10.0), (2, 12.0)])
    chart = line_chart([line], levels=[Level(name="a <budget>", value=40.0)], x_name="step")
    root = parsed(chart)
    (level,) = root.findall(".//line[@class='level']")
    assert 0 < float(level.attrib["y1"]) < min(y for _, y in points(chart))
    assert "a <budget> 40" in ["".join(text.itertext()) for text in root.iter("text")]


def test_many_points_are_thinned_to_what_stands_for_them() -> None:
    values = [(float(step), 1.0 if step != 777 else 9.0) for step in range(5000)]
    highest = points(line_chart([Line(name="peak", points=values)], x_name="step"))
    assert 300 < len(highest) <= 600
    assert sum(y < max(y for _, y in highest) - 1 for _, y in highest) == 1  # the peak is still there
    broken = [*values, (5000.0, math.nan), (5001.0, math.inf)]
    assert len(points(line_chart([Line(name="peak", points=broken)], x_name="step"))) <= 600
