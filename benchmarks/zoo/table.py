"""The rows as lines of JSON, as a table, and in a few numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.zoo.draw import Key
from benchmarks.zoo.row import Planned, Row

MIB = 2**20
#: The most that the smallest budget may be over the peak that checkpointing every block has.
BAR = 1.02

_HEAD = (
    "family",
    "name",
    "M params",
    "plain",
    "checkpoint",
    "right",
    "smallest",
    "smallest / checkpoint",
    "half: of budget",
    "smallest: of budget",
    "prediction off by",
    "bits",
    "planning s",
    "plain ms",
    "half ms",
    "smallest ms",
)


def read_rows(path: Path) -> list[Row]:
    """Read the rows that a file has; none if there is no file."""
    if not path.exists():
        return []
    return [Row.from_json(json.loads(line)) for line in path.read_text().splitlines() if line]


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row.as_json()) + "\n")


def missing(keys: Iterable[Key], rows: Iterable[Row], commit: str) -> list[Key]:
    """Return those of a draw that have no row of this commit yet."""
    there = {(row.family, row.name) for row in rows if row.commit == commit}
    return [key for key in keys if key not in there]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of each name, in the order of their first ones."""
    return list({(row.family, row.name): row for row in rows}.values())


def report(rows: Sequence[Row], seed: int, each: int | None, count: int, machine: str) -> str:
    """Return the page on a run; `count`: of the names that were drawn."""
    commits = sorted({row.commit for row in rows})
    drawn = "all names" if each is None else f"{each} names of each family, drawn by seed {seed}"
    head = [
        "# The zoo",
        "",
        f"{drawn}: {len(rows)} of {count} have been run; {machine}.",
        f"Rows are of commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}.",
        "",
        "MiB, with what is resident. checkpoint: `torch.utils.checkpoint` (non-reentrant) on every block, by the",
        "division into blocks with the smallest peak; right: its gradients are the plain step's. of budget: the peak",
        "by the memory events of `torch.profiler`. bits: of losses, gradients, buffers of two steps, where two plain",
        "steps agree on them. Times are of one thread's processor; planning is `measure` and one `fit` with nothing",
        "cached.",
        "",
    ]
    body = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    return "\n".join([*head, *summary(rows), "", *body, *map(_line, rows), ""])


def summary(rows: Sequence[Row]) -> list[str]:
    """Return what was found, as a list's items."""
    measured = [row for row in rows if row.outcome != "refused"]
    crashed = [row for row in measured if row.outcome != "ok"]
    above = [row for row in measured if row.ratio is not None and row.ratio > BAR]
    ratios = sorted(row.ratio for row in measured if row.ratio is not None)
    return [
        f"- {len(measured)} rows of {len({row.family for row in rows})} families"
        + (f"; {len(rows) - len(measured)} more whose plain step cannot be run" if len(rows) > len(measured) else ""),
        f"- crashes, timeouts: {_named(crashed)}",
        f"- unequal: {_named([row for row in measured if row.unequal])}",
        f"- over budget: {_named([row for row in measured if row.over_budget])}",
        f"- smallest budget above {BAR} of checkpoint's peak: {_named(above)}; {_spread(ratios)}",
    ]


def _spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return "checkpoint is right nowhere"
    middle = ratios[len(ratios) // 2]
    return f"of {len(ratios)} where it is right, median {middle:.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}"


def _named(rows: Sequence[Row]) -> str:
    return f"{len(rows)}" + (f" ({', '.join(f'{row.family} {row.name}' for row in rows)})" if rows else "")


def _line(row: Row) -> str:
    half, smallest = row.half, row.smallest
    cells = [
        row.family,
        row.name,
        f"{row.parameters / 1e6:.2f}",
        _mib(row.plain_bytes),
        "fails" if row.checkpoint_bytes is None else _mib(row.checkpoint_bytes),
        {True: "yes", False: "no", None: ""}[row.checkpoint_right],
        _mib(smallest.budget_bytes) if smallest else "",
        f"{row.ratio:.2f}" if row.ratio is not None else "",
        _of_budget(half),
        _of_budget(smallest),
        _off(half, smallest),
        _bits(row),
        f"{row.measuring_cpu_s + half.planning_cpu_s:.1f}" if half else "",
        f"{row.plain_ms:.0f}",
        f"{half.step_ms:.0f}" if half else "",
        f"{smallest.step_ms:.0f}" if smallest else "",
    ]
    if row.outcome != "ok":
        cells[-5] = f"{row.outcome}: {row.reason}".replace("|", "\\|")
    return "| " + " | ".join(cells) + " |"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.2f}" if nbytes else ""


def _of_budget(planned: Planned | None) -> str:
    if planned is None:
        return ""
    over = " OVER" if planned.measured_bytes > planned.budget_bytes else ""
    return f"{planned.measured_bytes / planned.budget_bytes:.4f}{over}"


def _off(*planned: Planned | None) -> str:
    found = [abs(one.predicted_bytes / one.measured_bytes - 1) for one in planned if one is not None]
    return f"{max(found):.2%}" if found else ""


def _bits(row: Row) -> str:
    if row.unequal:
        return f"{len(row.unequal)} DIFFER: {row.unequal[0]}"
    unstable = f" but {len(row.unstable)} unstable in plain" if row.unstable else ""
    return f"equal{unstable}" if row.smallest else ""
