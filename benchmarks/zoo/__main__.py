"""Run the zoo: models that nobody here wrote, plain, with every block checkpointed, and planned.

    python -m benchmarks.zoo [--seed N] [--each N] [--part I/N] [--only FAMILY[:NAME] ...]

Rows are added to a file of JSON lines as they end; those that it has of this commit are not run again.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.zoo.draw import Key, draw, part_of, read_names
from benchmarks.zoo.limited import Ended, Limits, preload, run_limited
from benchmarks.zoo.row import Row, measure_row
from benchmarks.zoo.table import append_row, missing, newest, read_rows, report, summary


def main() -> int:
    given = _arguments()
    names = read_names()
    each = None if given.each == 0 else given.each
    try:
        keys = part_of(draw(names, given.seed, each), given.part)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if given.only:
        keys = _only(given.only, keys)
    commit = _commit()
    waiting = [] if given.no_run else missing(keys, read_rows(given.rows), commit)
    print(f"seed {given.seed}: {len(keys)} names, {len(waiting)} to run at commit {commit}", file=sys.stderr)
    if waiting:
        preload()
    limits = Limits(seconds=given.seconds, memory_bytes=int(given.gib * 2**30))
    for number, (family, name) in enumerate(waiting, 1):
        row = _measured(Row(family=family, name=name, commit=commit), limits)
        append_row(given.rows, row)
        print(f"[{number}/{len(waiting)}] {family} {name}: {_said(row)}", file=sys.stderr, flush=True)
    rows = [row for row in newest(read_rows(given.rows)) if (row.family, row.name) in keys]
    machine = f"PyTorch {torch.__version__}, {platform.machine()}, one thread"
    given.page.parent.mkdir(parents=True, exist_ok=True)
    given.page.write_text(report(rows, given.seed, each, len(keys), machine))
    print("\n".join(summary(rows)))
    return int(any(row.outcome not in ("ok", "refused") or row.unequal or row.over_budget for row in rows))


def _measured(row: Row, limits: Limits) -> Row:
    ended: Ended = run_limited(measure_row, row, limits=limits)
    found: Row = ended.told[-1] if ended.told else row
    if ended.failure:
        kind = ended.failure if ended.failure in ("timeout", "memory") else "crash"
        found.outcome, found.reason = kind, "" if kind == ended.failure else ended.failure
    return found


def _said(row: Row) -> str:
    if row.outcome != "ok":
        return f"{row.outcome} {row.reason}"
    marks = [f"{len(row.unequal)} UNEQUAL"] if row.unequal else []
    marks += ["OVER BUDGET"] if row.over_budget else []
    return ", ".join([f"smallest / checkpoint {row.ratio:.3f}" if row.ratio else "checkpoint is not right", *marks])


def _only(given: list[str], keys: list[Key]) -> list[Key]:
    """Return those of the drawn keys that are of these families, and the names that are given, drawn or not."""
    named = [(family, name) for family, _, name in (one.partition(":") for one in given) if name]
    return named + [key for key in keys if key[0] in given]


def _commit() -> str:
    """The commit's short name, with a mark where the package's files are not those of the commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + (
        "+" if git("status", "--porcelain", "tightfit", "benchmarks/zoo") else ""
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--each", type=int, default=5, help="names of every family; 0: all")
    parser.add_argument("--part", default="1/1", help="which of how many parts of the draw, such as 2/5")
    parser.add_argument("--only", nargs="*", default=[], help="these families, or names, only")
    parser.add_argument("--no-run", action="store_true", help="only write the page on the rows that are there")
    parser.add_argument("--seconds", type=int, default=90, help="processor time of a row")
    parser.add_argument("--gib", type=float, default=6.0, help="memory of a row's process")
    parser.add_argument("--rows", type=Path, default=Path("runs/zoo/rows.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("runs/zoo/zoo.md"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
