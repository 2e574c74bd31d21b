"""The tests that need a CUDA device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_check.registry import Report, check
from tests.emulated_cuda.counters import is_active

_ROOT = Path(__file__).parents[3]


@check("tests", place=15, seconds=150, shows="tests/gpu")
def tests(report: Report) -> None:
    """Run pytest, and tell each test's outcome as it comes."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "-p", "no:cacheprovider"]
    if is_active():
        command += ["-m", "not needs_results"]
    process = subprocess.Popen(
        command, cwd=_ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    count = 0
    for line in process.stdout:
        print(line, end="", flush=True)
        found = re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", line)
        if found is None:
            continue
        count += 1
        name, outcome = found.groups()
        if outcome in ("SKIPPED", "XFAIL", "XPASS"):
            report.note(name, outcome=outcome)
        else:
            report.claim(name, "the test passes", outcome == "PASSED", outcome=outcome)
    report.claim("pytest", "it ends well", process.wait() == 0 and count > 0, tests=count)
