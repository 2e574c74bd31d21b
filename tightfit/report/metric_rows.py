"""Rows of a run's ``metrics.jsonl``, read as what somebody else may have written or a disk may have damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What every row has as numbers; the others may be there.
_NUMBERS = ("epoch", "loss", "lr", "step_ms", "peak_bytes", "budget_bytes", "samples_per_second")


@dataclass(frozen=True, kw_only=True)
class MetricRows:
    """The complete rows of the file, in its order."""

    rows: tuple[Mapping[str, Any], ...]
    lines: tuple[str, ...]
    """Their text."""
    damaged: int
    """Lines that are no rows."""


def read_metric_rows(path: Path) -> MetricRows:
    """Read the complete rows; a last line without an end is being written, and not among them."""
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    rows, lines, damaged = [], [], 0
    for line in text.split("\n")[:-1]:
        row = _row(line)
        if row is not None:
            rows.append(row)
            lines.append(line)
        elif line:
            damaged += 1
    return MetricRows(rows=tuple(rows), lines=tuple(lines), damaged=damaged)


def _row(line: str) -> Mapping[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 1:
        return None
    if not all(_is_number_or_none(row.get(name)) for name in _NUMBERS):
        return None
    evaluation = row.get("eval", {})
    if not isinstance(evaluation, dict) or not all(map(_is_number_or_none, evaluation.values())):
        return None
    return row


def _is_number_or_none(value: object) -> bool:
    return value is None or type(value) in (int, float)
