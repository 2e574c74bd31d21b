"""Would it fit? Predictions for GPUs that are not here, against what other people measured on them.

    python -m benchmarks.gpu_points --data FOLDER [--json] [--only xmem.csv:2] [--known ANSWERS.jsonl]
                                    [--profiles FOLDER]

FOLDER holds tables with the columns of xmem.csv, timm_brackets.csv, litgpt.csv and others.csv.  Nothing is run on a
GPU, no number is fitted: each row's training is built, without weights, observed as it would run on its card, and its
loop repeated in the model of the caching allocator, under each of the row's limits.  It needs torchvision, timm,
transformers 4.51.3, litgpt 0.4.11 and lightning; rows of a package that is missing have no answer, and it says so
before it begins.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_points.answers import Answer, answer
from benchmarks.gpu_points.models import TRANSFORMERS
from benchmarks.gpu_points.points import Point
from benchmarks.gpu_points.table import format_summary, summary
from benchmarks.gpu_points.tables import points_of

#: What the rows of each table are built with, and what to give pip for it.
_PACKAGES = {
    "xmem": {"torchvision": "torchvision", "transformers": f"transformers=={TRANSFORMERS}"},
    "timm": {"timm": "timm"},
    "litgpt": {"litgpt": "litgpt==0.4.11", "lightning": "lightning"},
}


def main() -> None:
    """Predict every row, and print how right that was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_points", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of tables")
    parser.add_argument("--only", default="", help="names of rows, separated by commas: those that begin so")
    parser.add_argument(
        "--known", type=Path, help="file of answers: those in it are not asked again, new ones are added"
    )
    parser.add_argument("--profiles", type=Path, help="folder that keeps profiles, so that later runs do not measure")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    begins = tuple(options.only.split(","))
    points = [point for point in points_of(options.data) if point.name.startswith(begins)]
    if not points:
        sys.exit(
            f"no row of a known table was found in {options.data}. It should hold xmem.csv, timm_brackets.csv, "
            "litgpt.csv or others.csv."
        )
    for line in _missing(points):
        print(line, file=sys.stderr)
    answers = _answers(points, options.known, options.profiles)
    found = summary(points, answers)
    print(json.dumps(found) if options.json else format_summary(points, answers, found))


def _missing(points: list[Point]) -> Iterator[str]:
    """Say of which tables no row can be answered here, and how they would be."""
    for table, packages in _PACKAGES.items():
        rows = sum(point.table == table for point in points)
        missing = [wanted for name, wanted in packages.items() if find_spec(name) is None]
        if rows and missing:
            yield (
                f"{rows} rows of {table} need {' and '.join(missing)}, not installed here, so some have no answer, "
                f"which counts as wrong. Run this with a Python that has it: pip install {' '.join(missing)}"
            )


def _answers(points: list[Point], known: Path | None, profiles: Path | None) -> list[Answer]:
    there = {}
    if known is not None and known.exists():
        there = {one["name"]: Answer(**one) for one in map(json.loads, known.read_text("utf-8").splitlines())}
    found = []
    for point in points:
        one = there.get(point.name)
        if one is None:
            one = answer(point, profiles)
            print(f"{point.name}: {one.seconds:.0f} s {one.problem}", file=sys.stderr, flush=True)
            if known is not None:
                with known.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(one)) + "\n")
        found.append(one)
    return found


if __name__ == "__main__":
    main()
