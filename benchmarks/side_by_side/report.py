"""The report: goals and what was found, then every figure."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import torch

from benchmarks.side_by_side.analysis import (
    NOISE,
    SMALL,
    Cell,
    cells,
    geometric_mean,
    overhead,
    quartiles,
    smallest,
)
from benchmarks.side_by_side.run import FamilyResult, Row, Scope

_PEERS = ("transformers", "fairscale", "deepspeed", "torch_remat", "pulp")
_MIB = 2**20


def report(results: Sequence[FamilyResult], scope: Scope, command: str, date: str, plot: str) -> str:
    """Markdown."""
    found = [cell for result in results for cell in cells(result, scope.fractions)]
    parts = [
        f"# Side by side: tightfit and its peers ({date})",
        f"    {command}",
        _machine(),
        _method(scope),
        f"![time against peak memory]({plot})",
        "## Goals",
        *_goals(results, found),
        "## Each budget",
        _cell_table(found),
        "## The smallest step",
        _smallest_table(results),
        "## Predicted and measured",
        _prediction(found),
        "## Every method",
        *(part for result in results for part in _family(result)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def points(result: FamilyResult) -> dict[str, Any]:
    """The peers' points of one model, as `tightfit frontier --peers` reads them."""
    return {
        "model": result.family,
        "points": [
            {
                "method": row.setup.method.name,
                "parameter": row.setup.method.parameter,
                "backend": row.setup.method.backend,
                "peak_bytes": row.setup.peak_bytes,
                "overhead_ratio": round(overhead(row), 4),
                "correct": row.setup.equal and row.setup.buffers_equal,
            }
            for row in result.rows
            if row.overheads and row.setup.method.name not in ("plain", "tightfit")
        ],
    }


def _machine() -> str:
    versions = []
    for name in ("torch", "tightfit", *_PEERS):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.backends.cpu.get_cpu_capability()}, one thread a "
        f"process, Python {platform.python_version()}, {', '.join(versions)}."
    )


def _method(scope: Scope) -> str:
    return (
        "Forward and backward; gradients are resident. A process for each method; "
        f"{scope.rounds} rounds in random order, in each of which every process runs three steps, and the last two "
        "count. *Overhead*: time over the same backend's plain step of the same round, median over the rounds (first "
        "and third quartile). *Peak*: by the independent meter (PyTorch's allocator events), parameters, gradients and "
        "batch included. *Recompute*: the time of all that the method runs more often than the plain step does, by one "
        "table of operation times for all methods (noise-free, and without any mechanism's own cost). *Budget*: place "
        "between the smallest peak of an eager peer and the plain peak. *Best peer*: the fastest eager peer within the "
        "budget whose loss and gradients are bit for bit plain's. *No plan below*: tightfit's lower bound, in "
        "modelled time. Compiled steps draw eager PyTorch's random numbers (`fallback_random`): else nothing could be "
        "compared. Every process keeps the memory that it once had (glibc gives none back), so that no step pays for "
        "getting it again. With `--at-once 2`, two models run at a time, each on a core."
    )


def _percent(part: float) -> str:
    return "-" if math.isnan(part) else f"{100 * part:.1f} %"


def _ratio(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / _MIB:.1f}"


def _spread(row: Row) -> str:
    first, third = quartiles(row)
    return f"{_percent(overhead(row))} ({100 * first:.1f} to {100 * third:.1f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _goals(results: Sequence[FamilyResult], found: Sequence[Cell]) -> Iterator[str]:
    middle = [cell for cell in found if 0.2 <= cell.fraction <= 0.8]
    low = [cell for cell in found if cell.fraction <= 0.1]
    mean = geometric_mean([cell.ratio for cell in middle])
    recompute = geometric_mean([cell.recompute_ratio for cell in middle])
    late = [cell for cell in low if cell.ratio > 1.05]
    lost = [cell for cell in found if cell.peer and _is_lost(cell)]
    over = [cell for cell in found if not cell.is_kept]
    small = [one for result in results if (one := smallest(result)) is not None]
    high = [one for one in small if one.ratio > 0.8]
    lines = [
        (
            "Middle of the range (20-80 %): geometric mean of tightfit's overhead over the best peer's, at most 0.6",
            f"{_ratio(mean)} over {len(middle)} cells (overheads below {NOISE:.0%} count as {NOISE:.0%}); "
            f"of modelled recomputation {_ratio(recompute)}",
            mean <= 0.6,
        ),
        (
            "Within 10 % of the best peer's minimum: at most 1.05",
            f"worst {_ratio(max((c.ratio for c in low), default=math.nan))}"
            + (f"; above it: {', '.join(f'{c.family} at {c.fraction:.0%}' for c in late)}" if late else ""),
            not late,
        ),
        (
            f"No loss beyond noise anywhere (a tie is enough where the best peer is below {SMALL:.0%})",
            "none"
            if not lost
            else ", ".join(
                f"{c.family} at {c.fraction:.0%} ({_percent(overhead(c.ours))} to {_percent(overhead(c.peer))})"
                for c in lost
                if c.peer
            ),
            not lost,
        ),
        (
            "Smallest step: bytes above the baseline at most 0.8 of the best peer's",
            f"geometric mean {_ratio(geometric_mean([one.ratio for one in small]))}"
            + (f"; above it: {', '.join(f'{o.family} {o.ratio:.2f}' for o in high)}" if high else ""),
            not high,
        ),
        (
            "Every plan's measured peak is within its budget",
            f"{len(found) - len(over)} of {len(found)}"
            + (f"; over: {', '.join(f'{c.family} at {c.fraction:.0%}' for c in over)}" if over else ""),
            not over,
        ),
    ]
    yield _table(("goal", "found", "met"), [(goal, what, "yes" if met else "**no**") for goal, what, met in lines])


def _is_lost(cell: Cell) -> bool:
    """Slower than the best peer, beyond noise: the quartiles do not meet."""
    assert cell.peer is not None
    first, third = quartiles(cell.ours)[0], quartiles(cell.peer)[1]
    slack = NOISE if overhead(cell.peer) < SMALL else 0.0
    return first > third + slack


def _cell_table(found: Sequence[Cell]) -> str:
    rows = []
    for cell in found:
        ours, peer = cell.ours, cell.peer
        rows.append(
            (
                cell.family,
                f"{cell.fraction:.0%}",
                _mib(cell.budget_bytes),
                _mib(ours.setup.peak_bytes),
                _spread(ours),
                f"{ours.setup.recompute_ms or 0:.1f}",
                f"{peer.setup.method.label}, {_mib(peer.setup.peak_bytes)}" if peer else "none fits",
                _spread(peer) if peer else "-",
                f"{peer.setup.recompute_ms or 0:.1f}" if peer else "-",
                f"**{_ratio(cell.ratio)}**",
            )
        )
    head = (
        "model", "budget", "MiB", "tightfit's peak", "overhead", "recompute ms", "best peer, MiB", "overhead",
        "recompute ms", "ratio",
    )  # fmt: skip
    return _table(head, rows)


def _smallest_table(results: Sequence[FamilyResult]) -> str:
    rows = []
    for result in results:
        if (one := smallest(result)) is None:
            continue
        rows.append(
            (
                one.family,
                _mib(one.ours.setup.baseline_bytes),
                f"{_mib(one.ours.setup.peak_bytes)}, {_percent(overhead(one.ours))}",
                f"{one.peer.setup.method.label}: {_mib(one.peer.setup.peak_bytes)}, {_percent(overhead(one.peer))}",
                f"**{_ratio(one.ratio)}**",
            )
        )
    return _table(("model", "baseline MiB", "tightfit: peak, overhead", "best peer", "bytes above baseline"), rows)


def _prediction(found: Sequence[Cell]) -> str:
    """Predicted step time over measured, by the overheads: both are relative to a plain step."""
    errors = [
        abs((1 + c.ours.setup.predicted_overhead) / (1 + overhead(c.ours)) - 1)
        for c in found
        if c.ours.setup.predicted_overhead is not None
    ]
    gaps = [
        (c.ours.setup.predicted_overhead - c.ours.setup.bound_overhead) / (1 + c.ours.setup.predicted_overhead)
        for c in found
        if c.ours.setup.predicted_overhead is not None and c.ours.setup.bound_overhead is not None
    ]
    rows = [
        (
            c.family,
            f"{c.fraction:.0%}",
            _percent(c.ours.setup.predicted_overhead or 0.0),
            _percent(overhead(c.ours)),
            _percent(c.ours.setup.bound_overhead or 0.0),
            f"{100 * (c.ours.setup.peak_bytes / c.ours.setup.predicted_peak_bytes - 1):+.2f} %",
        )
        for c in found
    ]
    words = (
        f"Step time, predicted against measured, relative to the plain step: median error "
        f"{_percent(statistics.median(errors))}, worst {_percent(max(errors))}. A plan's distance from its lower "
        f"bound: median {_percent(statistics.median(gaps))}, worst {_percent(max(gaps))} of the step."
    )
    return words + "\n\n" + _table(("model", "budget", "predicted", "measured", "no plan below", "peak's error"), rows)


def _family(result: FamilyResult) -> Iterator[str]:
    plain = result.row("plain")
    yield (
        f"### {result.family}: plain {statistics.median(plain.times_ms):.0f} ms, {_mib(plain.setup.peak_bytes)} MiB, "
        f"of which {_mib(plain.setup.baseline_bytes)} are parameters, gradients and batch"
    )
    ran = [row for row in result.rows if row.overheads and row is not plain]
    yield _table(
        ("method", "compared to", "peak MiB", "overhead", "recompute ms", "loss and gradients", "buffers"),
        [
            (
                row.setup.method.label,
                row.setup.method.backend,
                _mib(row.setup.peak_bytes),
                _spread(row),
                "-" if row.setup.recompute_ms is None else f"{row.setup.recompute_ms:.1f}",
                "equal" if row.setup.equal else f"differ by {row.setup.relative_difference:.0e}",
                "equal" if row.setup.buffers_equal else "**wrong**",
            )
            for row in sorted(ran, key=lambda row: (row.setup.method.backend != "eager", row.setup.peak_bytes))
        ],
    )
    compiled = [row for row in ran if row.setup.method.backend != "eager" and row.setup.method.value == 1.0]
    if compiled:
        yield (
            "Against eager plain: "
            + ", ".join(
                f"{row.setup.method.name} takes "
                f"{statistics.median(row.times_ms) / statistics.median(plain.times_ms):.2f} of its step time"
                for row in compiled
            )
            + "."
        )
    failed = [row.setup for row in result.rows if row.setup.failure]
    if failed:
        yield "Did not run: " + "; ".join(f"{s.method.label}: `{s.failure}`" for s in failed) + "."
