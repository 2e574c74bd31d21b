"""Points of other methods, read from a file, to draw beside a frontier."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.errors import UnsupportedInput, first_line


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerPoint:
    """The measured memory and time of one method with one parameter."""

    method: str
    parameter: str
    backend: str
    peak_bytes: int
    overhead_ratio: float
    """Its step's time / the plain step's time - 1."""
    correct: bool
    """Whether its step gave the plain step's result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """The content of a file of peers' points."""

    model: str
    """What they were measured on, in the file's words."""
    points: tuple[PeerPoint, ...]


_SHAPE = (
    '{"model": "gpt", "points": [{"method": "checkpoint", "parameter": "every block", "backend": "eager", '
    '"peak_bytes": 123456789, "overhead_ratio": 0.31, "correct": true}]}'
)


def load_peers(path: Path) -> Peers:
    """Read a file of peers' points.

    Raises:
        UnsupportedInput: there is no such file, or it has another shape.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UnsupportedInput(
            f"the file of peers {path} cannot be read: {problem.strerror}, so they cannot be drawn. Check --peers."
        ) from None
    except (ValueError, RecursionError) as problem:
        raise _misfit(path, f"it is not JSON ({first_line(problem)})") from None
    if not isinstance(content, Mapping):
        raise _misfit(path, "it holds no object")
    points = content.get("points")
    if not isinstance(points, list) or not points:
        raise _misfit(path, '"points" is missing, empty, or no list')
    model = content.get("model")
    if not isinstance(model, str):
        raise _misfit(path, '"model" is missing, or no text')
    return Peers(model=model, points=tuple(_point(path, place, point) for place, point in enumerate(points)))


def _point(path: Path, place: int, point: object) -> PeerPoint:
    if not isinstance(point, Mapping):
        raise _misfit(path, f"points[{place}] is no object")

    def text(name: str) -> str:
        value: Any = point.get(name)
        if not isinstance(value, str):
            raise _misfit(path, f"points[{place}].{name} is {value!r} instead of text")
        return value

    def number(name: str) -> float:
        value: Any = point.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _misfit(path, f"points[{place}].{name} is {value!r} instead of a number")
        return value

    peak_bytes = number("peak_bytes")
    if peak_bytes <= 0 or peak_bytes != int(peak_bytes):
        raise _misfit(path, f"points[{place}].peak_bytes is {peak_bytes!r} instead of a whole number above zero")
    correct = point.get("correct")
    if not isinstance(correct, bool):
        raise _misfit(path, f"points[{place}].correct is {correct!r} instead of true or false")
    return PeerPoint(
        method=text("method"),
        parameter=text("parameter"),
        backend=text("backend"),
        peak_bytes=int(peak_bytes),
        overhead_ratio=number("overhead_ratio"),
        correct=correct,
    )


def _misfit(path: Path, trouble: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"the file of peers {path} has no points that can be drawn: {trouble}. Write it like {_SHAPE}."
    )
