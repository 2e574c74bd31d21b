"""The quickest checks of `make gpu-check`, as that runs them; all of them take longer here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = ("facts", "layouts")


@pytest.mark.slow
def test_checks_run_and_leave_open_what_only_a_gpu_can_show(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--only", " ".join(CHECKS), "--patience", "20",
         "--seconds", "1000", "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["check"] for r in records if r.get("outcome") == "passed"] == list(CHECKS)
    machine = next(r for r in records if r.get("case") == "machine")
    assert machine["is_emulated"] is True
    (open_claim,) = [r for r in records if r["check"] == "facts" and "holds" in r and r["holds"] is None]
    assert open_claim["claim"] == "the GPU computes"
    assert (tmp_path / "table.txt").read_text() in done.stdout
