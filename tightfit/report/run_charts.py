"""The charts of a run: the memory of one step, time against memory, and what its logged steps say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tightfit.records import Plan, Profile
from tightfit.report.charts import Band, Chart, Level, Line, Mark, Point
from tightfit.report.run_files import RunFiles
from tightfit.simulation.timeline import Timeline, memory_timeline
from tightfit.solver.frontier import frontier_of
from tightfit.solver.solver import Solver, solver_of
from tightfit.units import format_bytes, unit_of

#: Budgets of the frontier: so many, fewer for steps so long that solving each takes seconds. Where an allocator caches,
#: a budget is solved for several times.
_MOST_BUDGETS, _LEAST_BUDGETS, _EVENTS_SOLVED, _TIMES_SOLVED = 12, 3, 200_000, 25


def memory_charts(run: RunFiles) -> list[Chart]:
    """Return the memory of one step as time goes by, plain and planned (once, where they are the same), the frontier,
    if there is one, and the measured peaks.
    """
    charts = [] if run.profile is None else _step_charts(run.plan, run.profile)
    return [chart for chart in (*charts, _peak_chart(run)) if not chart.is_empty]


def _step_charts(plan: Plan, profile: Profile) -> list[Chart]:
    solver = solver_of(profile)
    plain = memory_timeline(profile, [None] * len(profile.regions), index=solver.index)
    timelines = {"plain": plain}
    if not plan.is_plain:
        timelines["planned"] = memory_timeline(profile, plan.decisions, plan.shared_tapes, index=solver.index)
    top = max(timeline.peak_bytes for timeline in timelines.values())
    end_ms = max(timeline.end_ms for timeline in timelines.values())
    charts = [_timeline_chart(kind, found, plan, top, end_ms) for kind, found in timelines.items()]
    return [*charts, *_frontier_chart(solver, plan)]


def _timeline_chart(kind: str, found: Timeline, plan: Plan, top_bytes: int, end_ms: float) -> Chart:
    unit, unit_bytes = unit_of(top_bytes)
    budget = plan.budget_bytes / unit_bytes
    phases = [("backward", found.backward_ms), ("optimizer", found.optimizer_ms)]
    peak = found.peak_bytes / unit_bytes
    return Chart(
        name=f"memory-{kind}",
        title=f"{kind} step".capitalize(),
        x_name="ms, predicted",
        y_name=unit,
        bands=[Band(name=name, values=[v / unit_bytes for v in values]) for name, values in found.parts.items()],
        stack_x=found.ms,
        stack_end=found.end_ms,
        levels=[
            *([Level(name="budget", value=budget)] if plan.budget_bytes <= top_bytes else []),
            *(Level(name=name, value=ms, is_upright=True) for name, ms in phases if ms is not None),
        ],
        marks=[Mark(name=f"peak {format_bytes(found.peak_bytes)}", x=found.ms[found.peak_column], y=peak)],
        show="{:,.4g}".format,
        x_range=(0.0, end_ms),
        y_range=(0.0, top_bytes / unit_bytes),
    )


def _frontier_chart(solver: Solver, plan: Plan) -> list[Chart]:
    events = len(solver.profile.events) * (1 if solver.profile.allocator is None else _TIMES_SOLVED)
    points = max(_LEAST_BUDGETS, min(_MOST_BUDGETS, _EVENTS_SOLVED // (events + 1)))
    plain_bytes = solver.plain(0).plain_peak_bytes
    plans = frontier_of(solver, points)
    if len(plans) < 2:
        return []
    unit, unit_bytes = unit_of(plain_bytes)
    # The run's own plan takes its place among them, whatever a solver of today would choose.
    chosen = (min(plan.budget_bytes, plain_bytes) / unit_bytes, 100 * plan.overhead_ratio)
    solved = [(one.budget_bytes / unit_bytes, 100 * one.overhead_ratio) for one in plans]
    bounds = [
        (one.budget_bytes / unit_bytes, 100 * (one.lower_bound_ms / one.plain_step_ms - 1))
        for one in plans
        if one.plain_step_ms and not (one.shared_tapes and one.lower_bound_ms <= one.plain_step_ms)
    ]
    return [
        Chart(
            name="frontier",
            title="Time against memory",
            x_name=f"budget, {unit}",
            y_name="% added",
            lines=[
                Line(name="fastest plan", points=sorted({*solved, chosen}), holds=True),
                Line(name="no plan is faster", points=bounds, is_bound=True),
            ],
            marks=[Mark(name=f"this run {plan.overhead_ratio:+.1%}", x=chosen[0], y=chosen[1])],
            show="{:,.4g}".format,
        )
    ]


def run_charts(run: RunFiles) -> list[Chart]:
    """Return what the logged steps say; a chart without a point is left out, and a learning rate that stays."""
    losses = [
        Line(name="training loss", points=_points(run, "loss"), of_many=statistics.fmean),
        Line(name="held-out loss", points=_evaluations(run, "loss")),
    ]
    charts = [Chart(name="loss", title="Loss", lines=losses, show="{:.4g}".format)]
    names = {name for line in run.metrics for name in line.get("eval", ())}
    for name in sorted(names - {"loss", "samples", "peak_bytes"}):
        line = Line(name=name.replace("_", " "), points=_evaluations(run, name))
        charts.append(Chart(name=name, title=f"Held out: {line.name}", lines=[line], show="{:.4g}".format))
    rates = Line(name="samples per second", points=_points(run, "samples_per_second"), of_many=statistics.fmean)
    charts.append(Chart(name="throughput", title="Samples per second", lines=[rates], show="{:,.4g}".format))
    learning = _points(run, "lr")
    if len({rate for _, rate in learning}) > 1:
        line = Line(name="learning rate", points=learning)
        charts.append(Chart(name="learning-rate", title="Learning rate", lines=[line], show="{:.3g}".format))
    return [chart for chart in charts if not chart.is_empty]


def _peak_chart(run: RunFiles) -> Chart:
    budget = (run.summary or {}).get("budget_bytes", run.plan.budget_bytes)
    plain = run.plan.plain_peak_bytes
    unit, unit_bytes = unit_of(plain)
    levels = [Level(name="plain peak", value=plain / unit_bytes)]
    if budget <= 2 * plain:  # else the curve would be a line at the bottom
        levels.append(Level(name="budget", value=budget / unit_bytes))
    peaks = Line(name="peak", points=[(step, value / unit_bytes) for step, value in _points(run, "peak_bytes")])
    return Chart(
        name="peak",
        title="Measured peak of each logged step",
        y_name=unit,
        lines=[peaks],
        levels=levels,
        show="{:,.4g}".format,
        y_range=(0.0, 0.0),
    )


def _points(run: RunFiles, name: str) -> Sequence[Point]:
    return [(line["step"], line[name]) for line in run.metrics if line.get(name) is not None]


def _evaluations(run: RunFiles, name: str) -> Sequence[Point]:
    evaluated = [(line["step"], line["eval"].get(name)) for line in run.metrics if "eval" in line]
    return [(step, value) for step, value in evaluated if value is not None]
