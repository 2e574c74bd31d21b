"""`tightfit train` under a budget that binds, on the device that it chooses itself, and its resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
MIB = 2**20


def trained(*words: str) -> dict[str, Any]:
    """What a run says about itself at its end.  It has a process of its own: what others left reserved counts, too."""
    run = ["train", "--model", "gpt-tiny", "--dataset", "python-source", "--batch-size", "64", "--save-every", "2"]
    run += ["--log-every", "1", "--eval-samples", "8", "--reference-memory", "75%", "--device", "auto", "--json"]
    done = subprocess.run([sys.executable, "-m", "tightfit", *run, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def logged() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs/python-source/gpt-tiny/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_a_run_keeps_its_budget_on_the_gpu_and_goes_on_where_it_ended() -> None:
    plain = trained("--steps", "1", "--mark", "plain")
    budget = int(plain["plain_peak_bytes"]) - 4 * MIB
    found = trained("--steps", "4", "--memory", str(budget))
    assert found["measured_peak_bytes"] <= budget < found["plain_peak_bytes"]
    assert [line["step"] for line in logged()] == [1, 2, 3, 4]
    again = trained("--steps", "6", "--memory", str(budget), "--resume", "auto")
    assert again["measured_peak_bytes"] <= budget
    assert [line["step"] for line in logged()] == [1, 2, 3, 4, 5, 6]
    assert all(line["peak_bytes"] <= budget for line in logged())
    assert "cuda:0" in Path("runs/python-source/gpt-tiny/log.txt").read_text()
