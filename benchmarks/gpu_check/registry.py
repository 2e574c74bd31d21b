"""The checks by name, and what a check writes down.

A check is a function in `benchmarks.gpu_check.checks` that is registered with its time and what it shows.  It is run
in a process of its own, and tells what it finds line by line: `Report.note` for figures, `Report.claim` for what must
hold.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from tests.emulated_cuda.counters import is_active

Run = Callable[["Report"], None]


class Skip(Exception):
    """The check cannot be made here; its text says why."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check."""

    name: str
    place: int
    """Checks run in this order: what would invalidate the others comes first."""
    seconds: int
    """It is stopped after this long."""
    shows: str
    run: Run
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its process that PyTorch reads when it is imported."""


_CHECKS: dict[str, Check] = {}


def check(
    name: str, *, place: int, seconds: int, shows: str, environment: Mapping[str, str] | None = None
) -> Callable[[Run], Run]:
    """Register a function as a check."""

    def register(run: Run) -> Run:
        assert name not in _CHECKS
        _CHECKS[name] = Check(
            name=name, place=place, seconds=seconds, shows=shows, run=run, environment=environment or {}
        )
        return run

    return register


def all_checks() -> dict[str, Check]:
    """Return every check by name, the most telling first."""
    package = importlib.import_module("benchmarks.gpu_check.checks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return {one.name: one for one in sorted(_CHECKS.values(), key=lambda one: one.place)}


class Report:
    """What one check finds, written as JSON lines while it runs."""

    def __init__(self, name: str, file: IO[str]) -> None:
        self._name = name
        self._file = file
        self._began = time.perf_counter()
        self.failed = False

    def note(self, case: str, **figures: Any) -> None:
        """Write down what was found, without judging it."""
        self._write({"case": case, **figures})

    def claim(self, case: str, claim: str, holds: bool, *, needs_results: bool = False, **figures: Any) -> None:
        """Write down whether something holds that must.

        `needs_results`: on an emulated device, which computes nothing, it is not judged ("holds": null).
        """
        unknown = needs_results and is_active()
        self.failed |= not holds and not unknown
        self._write({"case": case, "claim": claim, "holds": None if unknown else bool(holds), **figures})

    def _write(self, record: dict[str, Any]) -> None:
        seconds = round(time.perf_counter() - self._began, 2)
        line = json.dumps({"check": self._name, "seconds": seconds, **record}, default=str)
        self._file.write(line + "\n")
        self._file.flush()
