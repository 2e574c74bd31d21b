"""Charts: every point in its place, round numbers on the axes, nothing that could break a page."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tightfit.report.charts import Band, Chart, Level, Line, Mark, nice_ticks
from tightfit.report.svg_chart import HEIGHT, WIDTH, svg_chart


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


def line_chart(lines: list[Line], **more: Any) -> str:
    return svg_chart(Chart(name="chart", title="a <chart>", lines=lines, **more))


def parsed(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{chart}</div>")


def points(chart: str) -> list[tuple[float, float]]:
    (line,) = parsed(chart).findall(".//polyline")
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_larger_values_are_drawn_higher_and_later_ones_further_right() -> None:
    drawn = points(line_chart([Line(name="loss", points=[(1, 4.0), (10, 1.0), (20, 2.0)])]))
    xs, ys = zip(*drawn, strict=True)
    assert list(xs) == sorted(xs)
    assert ys[0] < ys[2] < ys[1]


def test_one_point_no_point_and_equal_points() -> None:
    assert line_chart([]) == ""
    assert line_chart([Line(name="loss", points=[])]) == ""
    nothing = Line(name="held out", points=[(1, math.nan), (2, math.inf)])
    assert line_chart([nothing]) == ""
    assert len(points(line_chart([Line(name="loss", points=[(1, 2.0)]), nothing]))) == 1
    assert len(points(line_chart([Line(name="loss", points=[(3, 2.0)])]))) == 1
    assert len(points(line_chart([Line(name="loss", points=[(1, 0.0), (2, 0.0)])]))) == 2


def test_a_single_point_is_seen_in_the_middle_with_its_value() -> None:
    root = parsed(line_chart([Line(name="loss", points=[(40, 2.5)])], y_name="nats"))
    (dot,) = root.findall(".//circle")
    assert "shown" in dot.attrib["class"]
    assert abs(float(dot.attrib["cx"]) - WIDTH / 2) < 40
    assert "2.5 nats" in texts(root)
    assert "40" in texts(root)


def test_layers_add_up_and_stay_inside() -> None:
    bands = [
        Band(name="weights", values=[1.0, 1.0]),
        Band(name="none", values=[0, 0]),
        Band(name="rest", values=[3, 0]),
    ]
    mark = Mark(name="the peak", x=0, y=4.0)
    chart = Chart(name="memory", title="Memory", bands=bands, stack_x=[0, 2], stack_end=5, marks=[mark])
    root = parsed(svg_chart(chart))
    layers = root.findall(".//polygon")
    assert [layer.attrib["class"] for layer in layers] == ["band0", "band2"]  # what holds nothing is left out
    tops = [min(float(pair.split(",")[1]) for pair in layer.attrib["points"].split()) for layer in layers]
    assert tops[1] < tops[0] < HEIGHT
    (peak,) = root.findall(".//circle[@class='mark']")
    assert float(peak.attrib["cy"]) == tops[1]
    assert "the peak" in texts(root)
    keys = [key.text for key in root.iter("span")]
    assert keys == ["weights", "rest"]


def test_a_value_that_holds_goes_in_steps() -> None:
    corners = points(line_chart([Line(name="time", points=[(1, 4.0), (2, 1.0)], holds=True)]))
    assert len(corners) == 3
    assert corners[0][1] == corners[1][1]
    assert corners[1][0] == corners[2][0]


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter("text")]


def test_levels_are_inside_the_chart_and_named() -> None:
    line = Line(name="peak", points=[(1, 10.0), (2, 12.0)])
    chart = line_chart([line], levels=[Level(name="a <budget>", value=40.0)])
    root = parsed(chart)
    (level,) = root.findall(".//line[@class='level']")
    assert 0 < float(level.attrib["y1"]) < min(y for _, y in points(chart))
    assert "a <budget> 40" in texts(root)


@given(
    st.floats(0, 100),
    st.floats(0, 100),
    st.floats(0, 20),
    st.floats(0, 100),
    st.floats(15, 20),
)
def test_no_two_names_lie_over_each_other(
    backward: float, optimizer: float, budget: float, at: float, peak: float
) -> None:
    chart = Chart(
        name="memory",
        title="Planned step",
        y_name="GiB",
        bands=[Band(name="all", values=[20.0])],
        stack_x=[0],
        stack_end=100,
        levels=[
            Level(name="budget", value=budget),
            Level(name="backward", value=backward, is_upright=True),
            Level(name="optimizer", value=optimizer, is_upright=True),
        ],
        marks=[Mark(name="peak 20.0 GiB", x=at, y=peak)],
    )
    root = parsed(svg_chart(chart))
    names = [text for text in root.iter("text") if any(name in "".join(text.itertext()) for name in NAMES)]
    assert len(names) == len(NAMES)
    for one, other in combinations(names, 2):
        assert not (overlap(extent(one), extent(other)) and one.attrib["y"] == other.attrib["y"])
        assert extent(one)[0] >= 0
        assert extent(one)[1] <= WIDTH


NAMES = ("budget", "backward", "optimizer", "peak")


def extent(text: ElementTree.Element) -> tuple[float, float]:
    """From where to where a text reaches, by what its letters take on average."""
    x, width = float(text.attrib["x"]), 6.0 * len("".join(text.itertext()))
    return (x - width, x) if text.attrib["text-anchor"] == "end" else (x, x + width)


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def test_many_points_are_thinned_to_what_stands_for_them() -> None:
    values = [(float(step), 1.0 if step != 777 else 9.0) for step in range(5000)]
    highest = points(line_chart([Line(name="peak", points=values)]))
    assert 300 < len(highest) <= 600
    assert sum(y < max(y for _, y in highest) - 1 for _, y in highest) == 1  # the peak is still there
    broken = [*values, (5000.0, math.nan), (5001.0, math.inf)]
    assert len(points(line_chart([Line(name="peak", points=broken)]))) <= 600
