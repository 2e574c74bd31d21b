"""Charts as files, PNG and SVG, drawn by matplotlib (the extra ``report``).

Drawn with `matplotlib.figure.Figure` alone: no window, no pyplot, no global state of matplotlib is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.report.charts import Chart
from tightfit.report.frontier_plot import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
_LINES = ("#2563b0", "#c2570c", "#1a7f4b")
_BANDS = ("#56657a", "#8494a8", "#b3bfcc", "#d8dee6", "#3b82d6", "#f08a3c", "#a779d6")
_LEVEL, _INK, _RULE = "#b3261e", "#1c2430", "#dfe4ea"


def save_charts(charts: Iterable[Chart], folder: Path) -> list[Path]:
    """Draw each chart into ``NAME.png`` and ``NAME.svg`` of the folder, which is made; returns the files.

    `require_matplotlib` says before whether they can be drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in charts:
        figure = draw_chart(chart)
        for suffix in SUFFIXES:
            files.append(folder / f"{chart.name}{suffix}")
            save_figure(figure, files[-1], suffix)
    return files


def draw_chart(chart: Chart) -> Figure:
    """Draw one chart that is not empty."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    _draw_content(axes, chart)
    for level in chart.levels:
        if level.is_upright:
            axes.axvline(level.value, color=_INK, linestyle=":", linewidth=1)
            axes.annotate(
                level.name, (level.value, 1), xycoords=("data", "axes fraction"), xytext=(3, 2),
                textcoords="offset points", fontsize=9,
            )  # fmt: skip
        else:
            name = f"{level.name} {chart.show(level.value)} {chart.y_name}".rstrip()
            axes.axhline(level.value, color=_LEVEL, linestyle="--", linewidth=1.3, label=name)
    for mark in chart.marks:
        axes.plot([mark.x], [mark.y], marker="o", color="white", markeredgecolor=_INK, markeredgewidth=2, zorder=5)
        axes.annotate(mark.name, (mark.x, mark.y), xytext=(8, 5), textcoords="offset points", weight="bold", fontsize=9)
    axes.set_title(chart.title, fontsize=11, loc="left", pad=16 if any(one.is_upright for one in chart.levels) else 8)
    axes.set_xlabel(chart.x_name)
    axes.set_ylabel(chart.y_name)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: chart.show(value)))
    axes.grid(color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def _draw_content(axes: Axes, chart: Chart) -> None:
    if chart.stack_x:
        edges = [*chart.stack_x, chart.stack_end]
        below = [0.0] * len(chart.stack_x)
        for band, top, colour in zip(chart.bands, chart.stacked, _BANDS, strict=False):
            if top != below:
                axes.stairs(top, edges, baseline=below, fill=True, color=colour, label=band.name)
            below = top
    lines = chart.drawn_lines
    for place, line in enumerate(lines):
        xs, ys = zip(*line.points, strict=True)
        axes.plot(
            xs, ys, color=_LINES[place % len(_LINES)], linewidth=1.2 if line.is_bound else 1.8,
            linestyle="--" if line.is_bound else "-", drawstyle="steps-post" if line.holds else "default",
            marker="o" if len(xs) == 1 else "", label=line.name if len(lines) + len(chart.levels) > 1 else None,
        )  # fmt: skip
    if chart.x_range is not None:
        axes.set_xlim(*chart.x_range)
    if chart.y_range is not None:
        axes.set_ylim(bottom=chart.y_range[0], top=1.1 * chart.y_span[1])
