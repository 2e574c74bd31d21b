"""Text that the commands print: a plan's peak, a verdict, the time of measuring, metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.records import Plan, Profile, Verdict
from tightfit.units import format_budget, format_bytes


def format_peak(solved: Plan, more_bytes: int | None) -> str:
    """Format what the peak consists of, and what more memory would buy."""
    parts = format_parts(parts_of_peak(solved.breakdown, solved.peak_where))
    lines = [f"        peak at {solved.peak_where}: {parts}"]
    if solved.tape_host_bytes:
        lines.append(
            f"        beside it, up to {format_bytes(solved.tape_host_bytes)} of Python objects in host memory"
        )
    if more_bytes is not None:
        added = format_budget(more_bytes - solved.budget_bytes)
        lines.append(f"        more memory saves time from {format_budget(more_bytes)} on ({added} more)")
    elif not solved.is_plain:
        lines.append("        more memory saves no time")
    return "\n".join(lines)


def format_measuring(profile: Profile) -> str:
    """Format how long measuring took."""
    total_ms = sum(profile.measuring_ms.values())
    alone_ms = profile.measuring_ms.get("workspace", 0.0) + profile.measuring_ms.get("times", 0.0)
    return f"{total_ms / 1e3:.1f} s, {alone_ms / max(total_ms, 1e-9):.0%} of it on operations run alone"


def batch_note(solved: Plan, batch: str) -> str:
    """Return a line if the plan was made for another batch, for which its peak does not hold; else nothing."""
    if batch == solved.batch:
        return ""
    return f"  note        the plan is for batches of {solved.batch}: for this one, {batch}, it promises no peak\n"


def format_verdict(verdict: Verdict) -> str:
    """Format a verdict as a table."""
    return "\n".join(f"  {label:<11} {text}" for label, text in verdict.summary())


def format_gaps(verdict: Verdict) -> list[str]:
    """Return a line that says what the proof leaves open; none where it leaves nothing."""
    if verdict.ok is not None:
        return []
    return [f"proof   not complete: {verdict.reason}; --reference-memory lets the plain step take more"]


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format the metrics of an evaluation."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())


def finite_or_none(number: float) -> float | None:
    """Return what JSON can hold of a number: it has no infinity and no NaN."""
    return number if math.isfinite(number) else None
