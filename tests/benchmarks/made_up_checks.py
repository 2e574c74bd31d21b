"""Checks of all kinds, for the tests of what runs them: ``python -m tests.benchmarks.made_up_checks NAME FILE``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu_check.one_check import main
from benchmarks.gpu_check.registry import Check, Report, Run, Skip


def passes(report: Report) -> None:
    report.note("a case", variable=os.environ["MADE_UP"])
    report.claim("a case", "one is one", True)


def fails(report: Report) -> None:
    report.claim("a case", "one is two", False, found=1)
    report.claim("a case", "one is one", True)


def raises(report: Report) -> None:
    report.note("before")
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def crashes(report: Report) -> None:
    report.note("before")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(report: Report) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.note("before", child=child.pid)
    time.sleep(600)


def skips(report: Report) -> None:
    raise Skip("nothing to check here")


def _check(place: int, run: Run, seconds: int = 60) -> Check:
    name = run.__name__
    return Check(name=name, place=place, seconds=seconds, shows=f"{name}.", run=run, environment={"MADE_UP": "yes"})


CHECKS = {
    check.name: check
    for check in (
        _check(0, passes),
        _check(1, fails),
        _check(2, raises),
        _check(3, crashes),
        _check(4, hangs, seconds=6),
        _check(5, skips),
    )
}

if __name__ == "__main__":
    sys.exit(main(CHECKS[sys.argv[1]], int(sys.argv[2])))
