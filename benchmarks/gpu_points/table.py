"""How right the predictions were: counts, errors, and a line for each row."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu_points.answers import Answer
from benchmarks.gpu_points.points import OTHER_TOOLS, Point
from tightfit.device.described.cards import card_for
from tightfit.units import format_bytes

_FAR_OFF = 0.1


def summary(points: Sequence[Point], answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the figures, by table."""
    found: dict[str, Any] = {}
    for table in dict.fromkeys(point.table for point in points):
        pairs = [(p, a) for p, a in zip(points, answers, strict=True) if p.table == table]
        errors = [_error(p, a) for p, a in pairs if p.peak_bytes and a.reserved_bytes and not p.is_impossible]
        found[table] = {
            "rows": len(pairs),
            "rows_without_answer": [p.name for p, a in pairs if a.problem],
            "outcomes": sum(len(p.outcomes) for p, _ in pairs),
            "reserved": _counts((p, a.fits) for p, a in pairs),
            "allocated_alone": _counts((p, a.fits_live) for p, a in pairs),
            "rows_that_contradict_themselves": [p.name for p, _ in pairs if p.contradicts_itself],
            "uncapped_of": "allocated" if any(p.is_allocated for p, _ in pairs) else "reserved",
            "uncapped_rows": len(errors),
            "uncapped_error_median": statistics.median(map(abs, errors)) if errors else None,
            "uncapped_error_worst": max(errors, key=abs) if errors else None,
            "rows_far_off": [p.name for p, a in pairs if abs(_error(p, a)) > _FAR_OFF],
            "seconds_median": statistics.median(a.seconds for _, a in pairs),
            "cpu_seconds_median": statistics.median(a.cpu_seconds for _, a in pairs),
            **{tool: _other(tool, [p for p, _ in pairs]) for tool in OTHER_TOOLS},
        }
    return found


def _counts(said: Iterable[tuple[Point, Sequence[bool]]]) -> dict[str, Any]:
    """Count right answers; what was not answered is wrong, and neither a false yes nor a false no."""
    right = false_yes = false_no = outcomes = 0
    for point, fits in said:
        outcomes += len(point.outcomes)
        for outcome, fit in zip(point.outcomes, fits, strict=False):
            right += fit == outcome.ok
            false_yes += fit and not outcome.ok
            false_no += not fit and outcome.ok
    share = right / outcomes if outcomes else 0.0  # of peaks only, without outcomes
    return {"right": right, "share": share, "false_fits": false_yes, "false_does_not": false_no}


def _other(tool: str, points: Sequence[Point]) -> dict[str, Any]:
    """Count what another tool's estimate says of the caps, where it has one."""
    known = [point for point in points if tool in point.others]
    of_cards = {point.card: card_for(point.card).capacity_bytes for point in known}
    capped = [(p, [(o.limit_bytes or of_cards[p.card]) >= p.others[tool] for o in p.outcomes]) for p in known]
    errors = [abs(p.others[tool] / p.peak_bytes - 1) for p in known if p.peak_bytes]
    return {
        "rows": len(known),
        "outcomes": sum(len(point.outcomes) for point in known),
        **_counts(capped),
        "error_median": statistics.median(errors) if errors else None,
    }


def _error(point: Point, answer: Answer) -> float:
    if not point.peak_bytes or answer.problem or point.is_impossible:
        return 0.0
    return (answer.allocated_bytes if point.is_allocated else answer.reserved_bytes) / point.peak_bytes - 1


def format_summary(points: Sequence[Point], answers: Sequence[Answer], found: dict[str, Any]) -> str:
    """Return a line for each row, and the figures of each table."""
    lines = []
    for point, one in zip(points, answers, strict=True):
        marks = "".join(
            "." if fit == outcome.ok else ("Y" if fit else "N")
            for outcome, fit in zip(point.outcomes, one.fits, strict=False)
        )
        uncapped = f"{_error(point, one):+7.1%}" if point.peak_bytes and not one.problem else " " * 7
        lines.append(
            f"{point.name:<34} {point.model[:40]:<40} {point.batch_size:>4} {point.optimizer:<12} "
            f"{format_bytes(one.allocated_bytes):>10} {format_bytes(one.reserved_bytes):>10} {uncapped} "
            f"{marks or '-' * len(point.outcomes)} {one.problem[:60]}"
        )
    for table, figures in found.items():
        lines += ["", f"{table}: {figures['rows']} rows, {figures['outcomes']} outcomes"]
        for name in ("reserved", "allocated_alone", *OTHER_TOOLS):
            counts = figures[name]
            if counts["right"] or counts["false_fits"]:
                of = counts.get("outcomes", figures["outcomes"])
                lines.append(
                    f"  {name:<16} {counts['right']:>4} of {of} right ({counts['right'] / of:.1%}); "
                    f"{counts['false_fits']} false 'fits', {counts['false_does_not']} false 'does not'"
                )
        if figures["uncapped_rows"]:
            lines.append(
                f"  uncapped {figures['uncapped_of']}: {figures['uncapped_error_median']:.1%} off in the median of "
                f"{figures['uncapped_rows']} rows, {figures['uncapped_error_worst']:+.1%} at worst"
            )
        lines.append(
            f"  {figures['seconds_median']:.1f} s per answer in the median, of which the processor worked "
            f"{figures['cpu_seconds_median']:.1f} s"
        )
        for name in ("rows_without_answer", "rows_that_contradict_themselves", "rows_far_off"):
            if figures[name]:
                lines.append(f"  {name.replace('_', ' ')}: {', '.join(figures[name])}")
    lines.append("\n. right   Y said it fits, it did not   N said it does not fit, it did   - no answer")
    return "\n".join(lines)
