"""A frontier, time against budget, as a table and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.records import Plan, Profile
from tightfit.report.frontier_plot import bound_ratio
from tightfit.solver.solver import Solver
from tightfit.units import format_budget, format_bytes

_YOURS = "your budget"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A frontier, and the budgets on it that have a name."""

    profile: Profile
    plans: tuple[Plan, ...]
    smallest_bytes: int
    smallest_where: str
    """What sets the smallest budget."""
    one_level_bytes: int
    """The smallest budget without recursive recomputation."""
    marked_bytes: int | None
    """The user's budget."""
    solving_ms: float

    @classmethod
    def of(cls, solver: Solver, plans: Sequence[Plan], marked_bytes: int | None, solving_ms: float) -> Curve:
        """Make the curve of `plans`, which `solver` found."""
        smallest_bytes, where = solver.minimum_budget()
        return cls(
            profile=solver.profile,
            plans=tuple(plans),
            smallest_bytes=smallest_bytes,
            smallest_where=where,
            one_level_bytes=solver.least_budget(solver.smallest_at_one_level().peak_bytes),
            marked_bytes=marked_bytes,
            solving_ms=solving_ms,
        )

    @property
    def marked(self) -> Plan | None:
        """The plan for the user's budget; None without one, or if it is too small."""
        return next((plan for plan in self.plans if plan.budget_bytes == self.marked_bytes), None)

    def notes(self, plan: Plan) -> list[str]:
        """Return the names that a plan's budget has."""
        named = {
            "smallest": self.smallest_bytes,
            "smallest without recursion": self.one_level_bytes,
            "plain": plan.plain_peak_bytes,
            _YOURS: self.marked_bytes,
        }
        return [note for note, budget_bytes in named.items() if budget_bytes == plan.budget_bytes]


def curve_figures(curve: Curve) -> dict[str, Any]:
    """Return the curve as plain data."""
    first, marked = curve.plans[0], curve.marked
    return {
        **{name: getattr(first, name) for name in ("model", "batch", "device", "optimizer")},
        **{name: getattr(first, name) for name in ("baseline_bytes", "plain_peak_bytes", "plain_step_ms")},
        "smallest_budget_bytes": curve.smallest_bytes,
        "smallest_where": curve.smallest_where,
        "smallest_at_one_level_bytes": curve.one_level_bytes,
        "your_budget": None
        if curve.marked_bytes is None
        else {
            "budget_bytes": curve.marked_bytes,
            "runs": marked is not None,
            "point": None if marked is None else curve.plans.index(marked),
        },
        "points": [{**_figures(plan), "notes": curve.notes(plan)} for plan in curve.plans],
        "measuring_ms": dict(curve.profile.measuring_ms),
        "solving_ms": curve.solving_ms,
    }


def _figures(plan: Plan) -> dict[str, Any]:
    names = (
        "budget_bytes", "predicted_peak_bytes", "predicted_step_ms", "overhead_ratio", "lower_bound_ms", "exactness"
    )  # fmt: skip
    return {
        **{name: getattr(plan, name) for name in names},
        "share_of_plain_peak": plan.budget_bytes / plan.plain_peak_bytes,
        "planned_regions": sum(region.recipe >= 0 for region in plan.regions),
    }


def format_curve(curve: Curve) -> str:
    """Format the curve as a table."""
    first = curve.plans[0]
    table = [("budget", "of plain peak", "step", "added", "at best", "")]
    table += [_row(plan, curve.notes(plan)) for plan in curve.plans]
    too_small = curve.marked_bytes is not None and curve.marked_bytes < curve.smallest_bytes
    if too_small:
        assert curve.marked_bytes is not None
        share = f"{curve.marked_bytes / first.plain_peak_bytes:.1%}"
        table.insert(1, (format_bytes(curve.marked_bytes), share, "-", "-", "-", "your budget: too small"))
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    lines = [
        "  " + "  ".join([*(f"{line[column]:>{widths[column]}}" for column in range(5)), line[5]]).rstrip()
        for line in table
    ]
    lines.insert(0, f"model   {first.model}, batch {first.batch}, {first.optimizer}, on {first.device}")
    if too_small:
        lines.append(
            f"  your budget is too small: the smallest is {format_budget(curve.smallest_bytes)} "
            f"({curve.smallest_bytes} bytes), set by {curve.smallest_where}"
        )
    lines.append(
        f"  {format_bytes(first.baseline_bytes)} of every budget are parameters, gradients, optimizer state and batch"
    )
    return "\n".join(lines)


def _row(plan: Plan, notes: list[str]) -> tuple[str, str, str, str, str, str]:
    bound = bound_ratio(plan)
    formatted = format_bytes if notes == [_YOURS] else format_budget
    return (
        formatted(plan.budget_bytes),
        f"{plan.budget_bytes / plan.plain_peak_bytes:.1%}",
        f"{plan.predicted_step_ms:.2f} ms",
        f"{plan.overhead_ratio:+.1%}",
        "-" if bound is None else f"{bound:+.1%}",
        ", ".join(notes),
    )
