"""A frontier as a plot: added time against budget.

Drawn with `matplotlib.figure.Figure` alone: no window, no pyplot, no global state of matplotlib is touched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.errors import UnsupportedInput
from tightfit.records import Plan
from tightfit.report.peers import PeerPoint, Peers
from tightfit.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What can be written: the file's suffix, and what is put into it besides the picture. Dates are left out, so that the
#: same curve gives the same file.
_METADATA: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

# Colours of Okabe and Ito, which people with any colour vision can tell apart; shapes and dashes tell them apart again.
_CURVE, _BUDGET, _GREY = "#0072B2", "#D55E00", "#595959"
_PEER_COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_PEER_MARKERS = ("s", "^", "D", "v", "P", "*", "<", ">", "h", "p", "8")
#: A budget further to the right than this many plain peaks would squeeze the curve: it is written, not drawn to scale.
_FARTHEST = 1.3


def check_output(path: Path) -> None:
    """Raise `UnsupportedInput` if no plot can be written to a file of that name, or matplotlib is missing."""
    if path.suffix.lower() not in _METADATA:
        found = f"ends in {path.suffix}" if path.suffix else "has no suffix"
        raise UnsupportedInput(
            f"the plot's file {path} {found}, which does not say which kind of picture to write. "
            f"Give a name that ends in {', '.join(list(_METADATA)[:-1])} or {list(_METADATA)[-1]}."
        )
    require_matplotlib()


def require_matplotlib() -> None:
    """Raise `UnsupportedInput` if matplotlib is missing."""
    if not _has_matplotlib():
        raise UnsupportedInput(
            "matplotlib is not installed, and without it nothing can be drawn. "
            "Install it with `pip install 'tightfit[report]'`, or leave out the flag that asks for a plot."
        )


def save_figure(figure: Figure, path: Path, suffix: str) -> None:
    """Write the figure to `path` in the format of `suffix`, whatever the path's own suffix is."""
    kind = suffix.lower()
    figure.savefig(path, format=kind[1:], dpi=160, metadata=_METADATA[kind])


def draw_frontier(plans: Sequence[Plan], *, budget_bytes: int | None = None, peers: Peers | None = None) -> Figure:
    """Draw the curve of `plans`, which are in rising order of budget, a mark at `budget_bytes`, and peers' points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    axes = figure.add_subplot()
    scale = _scale(plans[-1].plain_peak_bytes)
    _draw_curve(axes, plans, scale)
    _draw_lines(axes, plans, budget_bytes, scale)
    if peers is not None:
        _draw_peers(axes, peers, scale)
    first = plans[0]
    measured_on = "" if peers is None else f"; others measured on {_text(peers.model)}"
    where = f"batch {_text(first.batch)}, on {_text(first.device)}{measured_on}"
    axes.set_title(f"{_text(first.model)}: time against memory\n{where}", fontsize=11, pad=8)
    axes.set_xlabel(f"budget ({scale.unit})", fontsize=11)
    axes.set_ylabel("added time of a step", fontsize=11)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda added, _: f"{added:+g} %" if round(added, 9) else "plain"))
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.margins(x=0.04, y=0.1)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    plain = first.plain_peak_bytes / scale.size_bytes
    shares = axes.secondary_xaxis("top", functions=(_times(100 / plain), _times(plain / 100)))
    shares.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g} %"))
    shares.set_xlabel("of the plain peak", fontsize=10)
    shares.spines["top"].set_visible(False)
    # Below the axes, where it can cover nothing.
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    return figure


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor


@dataclass(frozen=True)
class _Scale:
    unit: str
    size_bytes: int


def _scale(most_bytes: int) -> _Scale:
    """Choose the unit in which so many bytes are a number of few digits."""
    for unit, size_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if most_bytes >= size_bytes:
            return _Scale(unit, size_bytes)
    return _Scale("bytes", 1)


def _draw_curve(axes: Axes, plans: Sequence[Plan], scale: _Scale) -> None:
    # Beyond the plain peak nothing changes any more.
    plans = [plan for plan in plans if plan.budget_bytes <= plan.plain_peak_bytes]
    # Between two points, what is known: the left one's plan fits, and nothing beats the right one's bound.
    budgets = [plan.budget_bytes / scale.size_bytes for plan in plans]
    added = [100 * plan.overhead_ratio for plan in plans]
    axes.plot(
        budgets, added, color=_CURVE, marker="o", markersize=5, linewidth=2, drawstyle="steps-post",
        label="tightfit: the fastest plan found", zorder=4,
    )  # fmt: skip
    bounds = [(plan.budget_bytes / scale.size_bytes, bound_ratio(plan)) for plan in plans]
    bounded = [(budget, 100 * ratio) for budget, ratio in bounds if ratio is not None]
    axes.plot(
        [budget for budget, _ in bounded],
        [added for _, added in bounded],
        color="black", linestyle=(0, (4, 2)), linewidth=1.2, drawstyle="steps-pre",
        label="lower bound: no plan without recursive recomputation is faster", zorder=3,
    )  # fmt: skip


def bound_ratio(plan: Plan) -> float | None:
    """Return what any plan must add to the plain step, as a share of it; None where no bound is known, for plans with
    recursive recomputation.
    """
    if plan.shared_tapes and plan.lower_bound_ms <= plan.plain_step_ms:
        return None
    return plan.lower_bound_ms / plan.plain_step_ms - 1 if plan.plain_step_ms else 0.0


def _draw_lines(axes: Axes, plans: Sequence[Plan], budget_bytes: int | None, scale: _Scale) -> None:
    baseline_bytes, plain_bytes = plans[0].baseline_bytes, plans[0].plain_peak_bytes
    axes.axvline(
        baseline_bytes / scale.size_bytes, color=_GREY, linestyle=":", linewidth=1.6,
        label=f"{format_bytes(baseline_bytes)}: parameters, gradients, optimizer state, batch", zorder=2,
    )  # fmt: skip
    if budget_bytes is None:
        return
    label = f"your budget: {format_bytes(budget_bytes)}"
    if budget_bytes < plans[0].budget_bytes:
        label += f", below the smallest, {format_bytes(plans[0].budget_bytes)}"
    if budget_bytes <= _FARTHEST * plain_bytes:
        axes.axvline(
            budget_bytes / scale.size_bytes, color=_BUDGET, linestyle="-.", linewidth=1.6, label=label, zorder=2
        )
    else:
        axes.plot([], [], color=_BUDGET, marker=">", linestyle="none", label=f"{label}, far to the right")


def _draw_peers(axes: Axes, peers: Peers, scale: _Scale) -> None:
    methods: dict[str, list[PeerPoint]] = {}
    for point in peers.points:
        methods.setdefault(point.method, []).append(point)
    for place, (method, points) in enumerate(methods.items()):
        axes.plot(
            [point.peak_bytes / scale.size_bytes for point in points],
            [100 * point.overhead_ratio for point in points],
            color=_PEER_COLOURS[place % len(_PEER_COLOURS)], marker=_PEER_MARKERS[place % len(_PEER_MARKERS)],
            linestyle="none", markersize=8, markeredgecolor="black", markeredgewidth=0.6, label=_text(method), zorder=6,
        )  # fmt: skip
    wrong = [point for point in peers.points if not point.correct]
    if wrong:
        axes.plot(
            [point.peak_bytes / scale.size_bytes for point in wrong],
            [100 * point.overhead_ratio for point in wrong],
            color=_BUDGET, marker="x", linestyle="none", markersize=17, markeredgewidth=1.8,
            label="crossed out: not the plain step's result", zorder=5,
        )  # fmt: skip


def _text(name: str) -> str:
    """Escape a name so that a label shows it as it is: no formulas, and not hidden for its first underscore."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _has_matplotlib() -> bool:
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # sys.modules["matplotlib"] is None: its import is blocked
        return False
