"""What ever smaller budgets cost on one model: plain, 75 %, 50 %, 25 % of its peak, and the smallest that runs.

    python -m benchmarks.cumulative                                   # the figures of docs/benchmarks.md
    python -m benchmarks.cumulative --words "--model resnet --dataset digits --batch-size 64"

Each row is the verdict of the command in it, which runs the planned step beside the plain one: peaks are measured,
times are medians of interleaved steps, and a row is printed only where the bits are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
from typing import Any

from tightfit.cli.main import main as tightfit

WORDS = "--model gpt-tiny --model-args layers=12 --batch-size 16 --sequence-length 128"
SHARES = (0.75, 0.5, 0.25)


def run(words: list[str]) -> dict[str, Any]:
    """Run a command with --json; returns its document."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = tightfit([*words, "--json"])
    if code:
        raise SystemExit(f"tightfit {shlex.join(words)} ended with exit code {code}")
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def rows(words: list[str]) -> list[tuple[str, dict[str, Any], str]]:
    """Return (name, verdict, command) of each budget, the plain step first."""
    curve = run(["frontier", *words, "--points", "2"])["points"]
    smallest, plain = (curve[place]["budget_bytes"] for place in (0, -1))
    budgets = {"plain": plain}
    budgets |= {f"{share:.0%}": int(share * plain) for share in SHARES if share * plain > smallest}
    budgets["smallest"] = smallest
    found = []
    for name, budget in budgets.items():
        command = ["verify", *words, "--memory", str(budget), "--reference-memory", "75%"]
        found.append((name, run(command), f"tightfit {shlex.join(command)}"))
    return found


def table(found: list[tuple[str, dict[str, Any], str]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| budget | peak, MiB | of plain | step, ms | time | command |", "|---|---|---|---|---|---|"]
    for name, verdict, command in found:
        assert verdict["ok"], (name, verdict)
        peak, plain = verdict["measured_peak_bytes"], verdict["plain_peak_bytes"]
        lines.append(
            f"| {name} | {peak / 2**20:.1f} | {peak / plain:.0%} | {verdict['step_ms']:.0f} | "
            f"{verdict['overhead_ratio']:+.0%} | `{command}` |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", default=WORDS, help="model, data and batch, as tightfit takes them")
    print(table(rows(shlex.split(parser.parse_args().words))))


if __name__ == "__main__":
    main()
