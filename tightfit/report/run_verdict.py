"""What became of a run, in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.report.run_files import RunFiles
from tightfit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class RunVerdict:
    """The sentence, and the figures in it."""

    state: str
    """"good", "open" (not finished, or not all is proven) or "bad"."""
    sentence: str
    peak_bytes: int
    """The highest that was measured; 0: nothing was yet."""
    budget_bytes: int
    gradients: str
    """"equal", "DIFFER" or "not compared"."""
    compared: str
    """How much of the gradients that is said of."""


def verdict_of(run: RunFiles) -> RunVerdict:
    """Return the verdict on a run, finished or not."""
    plan, summary = run.plan, run.summary or {}
    logged = max((line["peak_bytes"] for line in run.metrics if line.get("peak_bytes") is not None), default=0)
    peak_bytes = summary.get("measured_peak_bytes") or logged
    budget_bytes = summary.get("budget_bytes", plan.budget_bytes)
    plain_bytes = summary.get("plain_peak_bytes", plan.plain_peak_bytes)
    equal = summary.get("gradients_equal")
    exceeded = peak_bytes > budget_bytes
    kept = f"{'EXCEEDED' if exceeded else 'Kept'} its budget of {format_bytes(budget_bytes)}"
    if not peak_bytes:
        clauses = [f"Planned for a budget of {format_bytes(budget_bytes)}", "no step is logged yet"]
    elif plan.is_plain:
        clauses = [f"{kept}: peak {format_bytes(peak_bytes)}", "the plain step fits, nothing is recomputed"]
    else:
        part_of = f"{peak_bytes / plain_bytes:.0%} of the plain step's {format_bytes(plain_bytes)}"
        cost = f"for {plan.overhead_ratio:+.1%} time (predicted)"
        clauses = [f"{kept}: peak {format_bytes(peak_bytes)}, {part_of}, {cost}"]
    share = summary.get("compared_share", 1)
    if equal is not None:
        part = f" ({share:.0%} of them compared)" if share < 1 else ""
        clauses.append(f"gradients {'bit for bit those' if equal else 'NOT EQUAL to those'} of the plain step{part}")
    elif run.summary is not None:
        clauses.append("gradients not compared (log.txt says why)")
    if run.summary is None:
        clauses.append("not finished")
    is_bad = exceeded or equal is False
    return RunVerdict(
        state="bad" if is_bad else "good" if equal and share >= 1 and run.summary is not None else "open",
        sentence=f"{'; '.join(clauses)}.",
        peak_bytes=peak_bytes,
        budget_bytes=budget_bytes,
        gradients={True: "equal", False: "DIFFER", None: "not compared"}[equal],
        compared=f"{'' if share >= 1 else f'{share:.0%} of them '}compared with the plain step's, bit for bit",
    )
