"""Which tables are read, and how."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.gpu_points.other_points import litgpt_points, others_points
from benchmarks.gpu_points.points import Point, timm_points, xmem_points

_READERS: Mapping[str, Callable[[str, Mapping[str, str]], Iterator[Point]]] = {
    "xmem.csv": xmem_points,
    "timm_brackets.csv": timm_points,
    "litgpt.csv": litgpt_points,
    "others.csv": others_points,
}


def points_of(folder: Path) -> Iterator[Point]:
    """Read the tables that are in the folder."""
    for name, read in _READERS.items():
        if (path := folder / name).exists():
            with path.open(newline="", encoding="utf-8") as file:
                for number, row in enumerate(csv.DictReader(file)):
                    yield from read(f"{name}:{number + 2}", row)
