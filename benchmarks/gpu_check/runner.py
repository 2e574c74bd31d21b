"""Run checks one after another, each in a process of its own, and write what they find as it comes.

A CUDA error that sticks to a process takes only the check that met it.  A check that hangs is ended at its time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_check.one_check import PASSED, SKIPPED
from benchmarks.gpu_check.registry import Check

#: What runs one check, as its arguments say.
_PROGRAM = "benchmarks.gpu_check.one_check"
#: Less time than this is not worth a process.
_LEAST_SECONDS = 5
#: Lines of a failed check's own output that are repeated in its record.
_TAIL_LINES = 15


@dataclass(kw_only=True)
class Outcome:
    """What became of one check."""

    check: Check
    outcome: str
    """passed, failed, skipped, timed out, not run, or "crashed" with the signal."""
    seconds: float
    claims: int = 0
    unjudged: int = 0
    broken: list[str] = field(default_factory=list)
    """The claims that do not hold."""
    reason: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong, as far as could be checked here."""
        return self.outcome in ("passed", "skipped")


def run_checks(checks: Iterable[Check], folder: Path, *, seconds: float, patience: float) -> list[Outcome]:
    """Run the checks until the time is over.

    Args:
        checks: what to run, in order.
        folder: where ``results.jsonl`` goes, and each check's own output as ``NAME.log``.
        seconds: for all checks together.
        patience: what each check's own time is multiplied with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes = []
    with (folder / "results.jsonl").open("a", encoding="utf-8") as results:
        for check in checks:
            outcome = _run_one(check, folder, results, min(check.seconds * patience, end - time.monotonic()))
            outcomes.append(outcome)
            _emit(results, json.dumps({"check": check.name, **_summary(outcome)}))
    return outcomes


def _run_one(check: Check, folder: Path, results: IO[str], seconds: float) -> Outcome:
    outcome = Outcome(check=check, outcome="not run", seconds=0.0)
    if seconds < _LEAST_SECONDS:
        outcome.reason = f"the time for all checks is over; repeat it with ONLY={check.name}"
        return outcome
    reading, writing = os.pipe()
    log = folder / f"{check.name}.log"
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, check.name, str(writing)],
            env={**os.environ, **check.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,
        )
    os.close(writing)
    with _stopped_after(process, seconds) as was_stopped, open(reading, encoding="utf-8", errors="replace") as records:
        for line in records:
            _emit(results, line.rstrip("\n"))
            _count(outcome, line)
        code = process.wait()
    outcome.seconds = round(time.monotonic() - begin, 1)
    outcome.outcome = _name_of(code, was_stopped.is_set())
    if not outcome.is_good and not outcome.broken:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        outcome.reason = "\n".join(lines[-_TAIL_LINES:])
    return outcome


@contextlib.contextmanager
def _stopped_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """End the process and what it started when the time is over, or the context is left."""
    was_stopped = threading.Event()

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop() -> None:
        was_stopped.set()
        end()

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        yield was_stopped
    finally:
        timer.cancel()
        end()  # also what a finished check has left behind
        process.wait()


def _name_of(code: int, was_stopped: bool) -> str:
    if was_stopped:
        return "timed out"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return {PASSED: "passed", SKIPPED: "skipped"}.get(code, "failed")


def _count(outcome: Outcome, line: str) -> None:
    record: dict[str, Any] = json.loads(line)
    if "claim" in record:
        outcome.claims += 1
        outcome.unjudged += record["holds"] is None
        if record["holds"] is False:
            outcome.broken.append(f"{record['case']}: {record['claim']}")
    elif record.get("case") == "skipped":
        outcome.reason = record["reason"]


def _summary(outcome: Outcome) -> dict[str, Any]:
    found = {"outcome": outcome.outcome, "seconds": outcome.seconds, "claims": outcome.claims}
    found |= {"unjudged": outcome.unjudged, "broken": outcome.broken, "reason": outcome.reason}
    return found


def _emit(results: IO[str], line: str) -> None:
    print(line, flush=True)
    results.write(line + "\n")
    results.flush()


def table(outcomes: Iterable[Outcome]) -> str:
    """Return what became of the checks, one a line, with what is wrong below."""
    rows = [("check", "outcome", "s", "claims", "unjudged", "shows")]
    rows += [
        (o.check.name, o.outcome, f"{o.seconds:.0f}", str(o.claims), str(o.unjudged), o.check.shows) for o in outcomes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for outcome in outcomes:
        wrong = [*outcome.broken, *([] if outcome.is_good or outcome.broken else outcome.reason.splitlines()[-1:])]
        if outcome.outcome == "skipped":
            wrong = [outcome.reason]
        lines += [f"{outcome.check.name} ({outcome.outcome}): {text}" for text in wrong]
    return "\n".join(lines)
