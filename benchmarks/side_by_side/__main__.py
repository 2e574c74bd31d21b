"""Tightfit and every peer, side by side.

python -m benchmarks.side_by_side [--quick] [--families gpt llama] [--output FOLDER]

Writes FOLDER/side-by-side_HARDWARE_DATE.md, .png, and for each model a file for `tightfit frontier --peers`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.kept_memory import KEEP_MEMORY
from benchmarks.side_by_side.families import FAMILIES
from benchmarks.side_by_side.plot import draw
from benchmarks.side_by_side.report import points, report
from benchmarks.side_by_side.run import FamilyResult, Scope, run_family

FULL = Scope(
    families=tuple(FAMILIES),
    fractions=(0.0, 0.1, 0.25, 0.45, 0.65, 0.85),
    rounds=5,
    every_k=(1, 2, 3, 4),
    compiled=("gpt", "llama", "unet"),
    ratios=(0.5, 0.0),
)
QUICK = Scope(families=("gpt", "convnext", "unet"), fractions=(0.1, 0.45), rounds=3, every_k=(1, 2), more_peers=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three models, two budgets, the main peers")
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), help="only these models")
    parser.add_argument("--at-once", type=int, default=1, help="models at a time, each on a core of its own")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for the report")
    given = parser.parse_args()
    scope = QUICK if given.quick else FULL
    if given.families:
        scope = replace(scope, families=tuple(given.families))
    os.environ["KINETO_LOG_LEVEL"] = "99"  # inherited by the workers, whose profiler else announces each of its starts
    os.environ.update(KEEP_MEMORY)  # inherited, too
    given.output.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    stem = f"side-by-side_cpu-{os.cpu_count()}-cores_{date}"
    begin = time.monotonic()
    results: list[FamilyResult] = []
    pool = ThreadPoolExecutor(given.at_once)
    for result in pool.map(partial(run_family, scope=scope), scope.families):
        results.append(result)
        # Written anew after each model: a run that is cut off leaves what it has found.
        draw(results, given.output / f"{stem}.png")
        text = report(
            results, scope, " ".join(["python -m benchmarks.side_by_side", *sys.argv[1:]]), date, f"{stem}.png"
        )
        (given.output / f"{stem}.md").write_text(text)
        (given.output / f"{stem}_{result.family}.json").write_text(json.dumps(points(results[-1]), indent=1) + "\n")
    print(text)
    print(f"written to {given.output / stem}.md in {(time.monotonic() - begin) / 60:.0f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
