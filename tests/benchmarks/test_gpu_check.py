"""What runs the checks of `make gpu-check`: one that fails, crashes or hangs takes no other, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import runner
from benchmarks.gpu_check.registry import all_checks
from benchmarks.gpu_check.runner import Outcome, run_checks, table
from tests.benchmarks.made_up_checks import CHECKS


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_PROGRAM", "tests.benchmarks.made_up_checks")


def run(folder: Path, *names: str, seconds: float = 300, patience: float = 1) -> list[Outcome]:
    return run_checks([CHECKS[name] for name in names], folder, seconds=seconds, patience=patience)


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_a_check_that_ends_badly_takes_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run(tmp_path, "raises", "crashes", "fails", "skips", "passes")
    assert [o.outcome for o in outcomes] == ["failed", "crashed (SIGSEGV)", "failed", "skipped", "passed"]
    assert [o.is_good for o in outcomes] == [False, False, False, True, True]
    assert "an illegal memory access" in outcomes[0].reason
    assert (outcomes[2].claims, outcomes[2].broken) == (2, ["a case: one is two"])
    written = records(tmp_path)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == written
    assert {"check": "passes", "case": "a case", "variable": "yes"}.items() <= written[-3].items()
    assert [r["check"] for r in written if r.get("case") == "before"] == ["raises", "crashes"]
    text = table(outcomes)
    assert "fails (failed): a case: one is two" in text
    assert "skips (skipped): nothing to check here" in text
    assert re.search(r"crashes +crashed \(SIGSEGV\)", text)


@pytest.mark.slow
def test_a_check_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    for patience in (1, 10, 50):  # on a busy machine Python may take longer to start than the check may take
        folder = tmp_path / str(patience)
        (outcome,) = run(folder, "hangs", seconds=400, patience=patience)
        assert outcome.outcome == "timed out"
        child = records(folder)[0].get("child")
        if child is not None:
            break
    assert isinstance(child, int)
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_there_is_no_time_for_is_not_run_and_not_good(tmp_path: Path) -> None:
    (outcome,) = run(tmp_path, "passes", seconds=1)
    assert (outcome.outcome, outcome.is_good) == ("not run", False)
    assert "ONLY=passes" in outcome.reason
    assert records(tmp_path)[-1]["outcome"] == "not run"


def test_the_checks_are_in_order_and_a_wrong_name_is_told() -> None:
    checks = all_checks()
    assert next(iter(checks)) == "facts"
    assert [check.place for check in checks.values()] == list(range(len(checks)))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--only", "facts,fact"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no check fact;" in done.stderr
