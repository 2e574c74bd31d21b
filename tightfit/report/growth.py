"""The largest batch within a budget, as text, as plain data, and as a plot of time per sample against the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.records import Plan
from tightfit.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Times(Protocol):
    """`planning.grow.BatchTimes`."""

    batch_size: int
    plain_ms: float | None
    full_ms: float | None
    planned_ms: float | None


class _Growth(Protocol):
    """`planning.grow.Growth`."""

    largest: int
    plan: Plan
    plain_largest: int
    full_largest: int
    times: Sequence[_Times]
    confirmed: bool
    most: int

    @property
    def best(self) -> int: ...


#: Each way, with its label and its colour (of Okabe and Ito).
_WAYS = {
    "plain_ms": ("plain", "#0072B2"),
    "full_ms": ("every region recomputed", "#D55E00"),
    "planned_ms": ("tightfit", "#009E73"),
}


def growth_figures(found: Any) -> dict[str, Any]:
    """Return the figures as plain data."""
    growth: _Growth = found
    return {
        "largest": growth.largest,
        "plain_largest": growth.plain_largest,
        "full_largest": growth.full_largest,
        "best": growth.best,
        "confirmed": growth.confirmed,
        "most": growth.most,
        "budget_bytes": growth.plan.budget_bytes,
        "predicted_peak_bytes": growth.plan.predicted_peak_bytes,
        "times": [{"batch_size": one.batch_size, **{way: getattr(one, way) for way in _WAYS}} for one in growth.times],
    }


def format_growth(found: Any) -> str:
    """Format the largest batches, what the peak consists of, and a line for each batch that was compared."""
    growth: _Growth = found
    plan = growth.plan
    sure = "confirmed by a measured step" if growth.confirmed else "not confirmed: the device is not here"
    if growth.largest == growth.most:
        sure += "; the most that was tried, so that more may fit"
    lines = [
        f"largest {growth.largest} samples within {format_bytes(plan.budget_bytes)} ({sure})",
        f"        {growth.plain_largest} without a plan, {growth.full_largest} with every region recomputed; the least "
        f"time per sample, of those compared, with {growth.best}",
        f"        peak {format_bytes(plan.predicted_peak_bytes)} at {plan.peak_where}: "
        f"{format_parts(parts_of_peak(plan.breakdown, plan.peak_where))}",
        "",
        f"{'samples':>9} " + " ".join(f"{label:>24}" for label, _ in _WAYS.values()) + "   (ms per sample)",
    ]
    for one in growth.times:
        shown = [getattr(one, way) for way in _WAYS]
        cells = " ".join(f"{'does not fit' if ms is None else f'{ms:.3f}':>24}" for ms in shown)
        lines.append(f"{one.batch_size:>9} {cells}")
    return "\n".join(lines)


def draw_growth(found: Any) -> Figure:
    """Draw the time per sample against the batch, each way as far as it fits."""
    from matplotlib.figure import Figure

    growth: _Growth = found
    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for way, (label, colour) in _WAYS.items():
        points = [(one.batch_size, ms) for one in growth.times if (ms := getattr(one, way)) is not None]
        if points:
            # Where nothing is recomputed, tightfit's line lies on the plain one: the larger dots show beneath.
            axes.plot(
                *zip(*points, strict=True), "o-", color=colour, label=label, markersize=11 if way == "plain_ms" else 6
            )
    axes.margins(x=0.06)
    axes.set_title(f"{growth.plan.model} within {format_bytes(growth.plan.budget_bytes)}", fontsize=11)
    axes.set_xlabel("samples in a batch", fontsize=11)
    axes.set_ylabel("ms per sample", fontsize=11)
    axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
