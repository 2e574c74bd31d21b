"""Draw the figures of README.md and docs/benchmarks.md from a report of `benchmarks.side_by_side`.

    python -m benchmarks.landing_figure [REPORT.md] [--output docs/figures]

Nothing is measured: the points are those of the report's tables "Every method".  Compiled methods are left out, because
their times are relative to another plain step.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "benchmarks/results/side-by-side_cpu-2-cores_2026-11-28.md"
#: The models of README.md, with what a reader should know of them.
LANDING = {"gpt": "GPT, 8 blocks", "resnet": "ResNet"}

OURS = "tightfit"
_BLUE = "#0072B2"
#: What a group of methods is called in the legend, its colour (Okabe and Ito 2008: colour-blind safe) and its shape.
_PEERS = {
    "checkpoint": ("checkpoint every 1, 2, 3 or 4 blocks", "#E69F00", "s"),
    "transformers": ("checkpoint every 1, 2, 3 or 4 blocks", "#E69F00", "s"),
    "op list": ("selective checkpoint, list of ops", "#009E73", "^"),
    "sac_ilp": ("PyTorch's sac_ilp", "#CC79A7", "D"),
    "fairscale": ("fairscale, deepspeed, torch_remat", "#666666", "v"),
    "deepspeed": ("fairscale, deepspeed, torch_remat", "#666666", "v"),
    "torch_remat": ("fairscale, deepspeed, torch_remat", "#666666", "v"),
}
#: Overheads above this are named at the figure's edge instead of drawn: they would press all others together.
_TOP_PERCENT = 65.0

_HEADING = re.compile(r"### (\w+): plain [\d.]+ ms, ([\d.]+) MiB, of which ([\d.]+) ")
_ROW = re.compile(r"\| (?P<method>[^|]+) \| eager \| (?P<mib>[\d.]+) \| (?P<overhead>-?[\d.]+) % [^|]*\|")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method's step: its peak and its time, relative to the plain step."""

    method: str
    peak_percent: float
    overhead_percent: float
    equal: bool
    """Whether loss, gradients and buffers are those of the plain step."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the report."""

    name: str
    resident_percent: float
    """Parameters, gradients and batch, relative to the plain peak."""
    points: tuple[Point, ...]


def read_report(text: str) -> dict[str, Model]:
    """Return the models of a report with all points of eager methods."""
    _, *sections = re.split(r"^(?=### )", text.partition("## Every method")[2], flags=re.MULTILINE)
    models = {}
    for section in sections:
        heading = _HEADING.match(section)
        assert heading is not None, section.partition("\n")[0]
        name, plain_mib, resident_mib = heading[1], float(heading[2]), float(heading[3])
        points = tuple(
            Point(
                method=row["method"],
                peak_percent=100 * float(row["mib"]) / plain_mib,
                overhead_percent=float(row["overhead"]),
                equal=row.string[row.end() : row.string.index("\n", row.end())].count(" equal ") == 2,
            )
            for row in _ROW.finditer(section)
        )
        models[name] = Model(name=name, resident_percent=100 * resident_mib / plain_mib, points=points)
    return models


def draw(models: Sequence[Model], *, columns: int, titles: dict[str, str]) -> Figure:
    """Return the figure: one panel for each model, time against peak memory."""
    from matplotlib.figure import Figure

    rows = -(-len(models) // columns)
    height_in = 0.9 + 3.5 * rows
    figure = Figure(figsize=(4.9 * columns, height_in), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    legend: dict[str, object] = {}
    for panel, model in zip(axes, models, strict=True):
        legend |= _draw_panel(panel, model)
        panel.set_title(titles.get(model.name, model.name), fontsize=12, fontweight="bold", loc="left")
    axes[0].annotate(
        "better", xy=(18, 2), xytext=(26, 12), color="0.4", arrowprops={"arrowstyle": "->", "color": "0.4"}
    )
    for panel in axes[-columns:]:
        panel.set_xlabel("peak memory, % of the plain step's")
    for panel in axes[::columns]:
        panel.set_ylabel("time added to the step, %")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return figure


def _draw_panel(panel: Axes, model: Model) -> dict[str, object]:
    """Draw a model's points; return what its legend names."""
    legend: dict[str, object] = {}
    for point in model.points:
        kind = next((name for name in _PEERS if point.method.startswith(name)), None)
        if kind is not None:
            label, colour, shape = _PEERS[kind]
            fill = "full" if point.equal else "none"
            place = [point.peak_percent], [point.overhead_percent]
            (drawn,) = panel.plot(*place, shape, color=colour, markersize=7, fillstyle=fill, zorder=2)
            if point.equal:
                legend[label] = drawn
    ours = sorted((p for p in model.points if p.method.startswith(OURS)), key=lambda p: p.peak_percent)
    peaks, overheads = [p.peak_percent for p in ours], [p.overhead_percent for p in ours]
    (line,) = panel.plot([*peaks, 100], [*overheads, 0], "-o", color=_BLUE, linewidth=2.4, markersize=6.5, zorder=3)
    (plain,) = panel.plot([100], [0], "o", color="white", markeredgecolor="black", markersize=8, zorder=4)
    (hollow,) = panel.plot([], [], "o", color="0.4", fillstyle="none", markersize=7)
    resident = panel.axvspan(0, model.resident_percent, color="0.92", zorder=0)
    if overheads[0] > _TOP_PERCENT:
        smallest = f"smallest: {peaks[0]:.0f} % of memory,\n+{overheads[0]:.0f} % time"
        panel.text(103, _TOP_PERCENT - 2, smallest, va="top", ha="right", fontsize=9, color=_BLUE)
    panel.set_xlim(0, 104)
    panel.set_ylim(-4, _TOP_PERCENT)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    return {
        OURS: line,
        **legend,
        "plain PyTorch": plain,
        "hollow: not the plain step's results": hollow,
        "parameters, gradients, batch": resident,
    }


def main() -> None:
    """Draw both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path, default=REPORT, metavar="REPORT.md")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figures", help="folder for the figures")
    given = parser.parse_args()
    models = read_report(given.report.read_text(encoding="utf-8"))
    given.output.mkdir(parents=True, exist_ok=True)
    landing = draw([models[name] for name in LANDING], columns=2, titles=LANDING)
    landing.savefig(given.output / "overhead-against-peak.png", dpi=150)
    every = draw(list(models.values()), columns=3, titles={})
    every.savefig(given.output / "overhead-against-peak_all-models.png", dpi=110)


if __name__ == "__main__":
    main()
