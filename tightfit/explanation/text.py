"""The parts of an explanation as text."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from tightfit.explanation.breakdown import COMPONENTS, Breakdown, grouped
from tightfit.explanation.ways import Way
from tightfit.units import format_bytes

_MOST_ROWS = 14
_WIDTH = 92
#: Owners that are no modules, and components, for people.
_NAMES = {
    "<model>": "(the model's own code)", "<loss>": "(outside the model)", "<batch>": "(batch)",
    "<optimizer>": "(optimizer step)", "<other>": "(beside the step)",
    "optimizer_state": "optimizer", "other": "other",
}  # fmt: skip
_MOMENTS = {"<loss>": "the loss", "<model>": "the model's own code"}
_EXACTNESS = {"bitwise": "same bits", "rounding": "sums in another order", "other": "other numbers"}


def format_breakdown(breakdown: Breakdown, what: str) -> list[str]:
    """Format who holds what, with a table by module; `what` says of which step."""
    total = breakdown.total_bytes
    moment = breakdown.moment
    for name, told in _MOMENTS.items():
        moment = moment.replace(name, told)
    lines = [f"peak    {format_bytes(total)}: {moment} ({what})"]
    shown = [
        f"{_NAMES.get(name, name)} {format_bytes(nbytes)} ({nbytes / total:.0%})"
        for name, nbytes in breakdown.components.items()
        if nbytes
    ]
    lines += wrapped("        ", ", ".join(shown))
    if breakdown.held_for_backward_bytes:
        lines.append(f"        held for backward when that begins: {format_bytes(breakdown.held_for_backward_bytes)}")
    return [*lines, *_table(breakdown)]


def _table(breakdown: Breakdown) -> list[str]:
    """Return the modules' table; its last line is the sum of all others."""
    group_of = grouped(breakdown.parts, _MOST_ROWS)
    rows: dict[str, Counter[str]] = {}
    modules: Counter[str] = Counter(group_of.values())
    for owner, part in breakdown.parts.items():
        rows.setdefault(group_of[owner], Counter()).update(part)
    columns = [name for name in COMPONENTS if breakdown.components[name]]
    table = [["by module", *(_NAMES.get(name, name) for name in columns), "all"]]
    for group, part in sorted(rows.items(), key=lambda row: -row[1].total()):
        label = _NAMES.get(group, group) + (f" ({modules[group]})" if modules[group] > 1 else "")
        table.append([label, *(format_bytes(part[name]) if part[name] else "" for name in columns)])
        table[-1].append(format_bytes(part.total()))
    sums = breakdown.components
    table.append(["all", *(format_bytes(sums[name]) for name in columns), format_bytes(breakdown.total_bytes)])
    return _aligned(table)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        ("  " + "  ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]))
        for row in table
    ]


def format_ways(ways: Sequence[Way], target_bytes: int | None) -> list[str]:
    """Format what would help, with code to paste."""
    if not ways:
        return ["help    nothing was found that would take less memory"]
    if target_bytes is None:
        lines = ["help    same bits first, then by the share of memory saved less the share of time added"]
    else:
        lines = [f"help    for {format_bytes(target_bytes)}: what fits, the fastest first"]
    plain = ways[0]
    lines.append(
        f"        a step now: {format_bytes(plain.plain_peak_bytes)}, {plain.plain_step_ms:.1f} ms (predicted)"
    )
    for number, way in enumerate(ways, 1):
        fits = target_bytes is None or way.peak_bytes <= target_bytes
        lines += ["", f"  {number}. {_headline(way)}{'' if fits else '  - does not fit'}"]
        lines += textwrap.wrap(f"{way.title} ({_EXACTNESS[way.exactness]})", _WIDTH, initial_indent="     ",
                               subsequent_indent="     ")  # fmt: skip
        if way.name not in {other.name for other in ways[: number - 1]}:
            lines += textwrap.indent(way.code, "         ").splitlines()
        elif way.budget_bytes is not None:
            lines.append(f"         the code of the first such way, with budget={_budget_in(way)}")
    return lines


def _headline(way: Way) -> str:
    return f"{format_bytes(way.peak_bytes)} ({-way.saved_ratio:+.0%}), {way.step_ms:.1f} ms ({way.overhead_ratio:+.0%})"


def _budget_in(way: Way) -> str:
    return way.code.partition("budget=")[2].partition(",")[0].partition(")")[0]


def wrapped(label: str, text: str) -> list[str]:
    """Wrap a text to lines that begin below each other, after a label."""
    return textwrap.wrap(text, _WIDTH, initial_indent=label, subsequent_indent=" " * len(label))
