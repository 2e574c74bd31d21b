"""`tightfit train` under a budget that binds, on the device that it chooses itself, and its resume."""

from __future__ import annotations

import json
import re
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


def demo() -> list[str]:
    """The command line of `make train`."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    line = re.search(r"^DEMO := ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    assert line is not None
    return line[1].replace("\\\n", " ").replace("$(RUNS)", "runs").split()


def trained(*words: str) -> dict[str, Any]:
    """What a run says about itself at its end.  It has a process of its own: what others left reserved counts, too."""
    command = [sys.executable, "-m", "tightfit", "train", *words, "--log-every", "1", "--eval-samples", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


TINY = ["--model", "gpt-tiny", "--dataset", "python-source", "--batch-size", "64", "--save-every", "2"]
TINY += ["--reference-memory", "75%", "--device", "auto"]


def logged() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs/python-source/gpt-tiny/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_a_run_keeps_its_budget_on_the_gpu_and_goes_on_where_it_ended() -> None:
    plain = trained(*TINY, "--steps", "1", "--mark", "plain")
    # Without a cap the allocator may reserve more than the step needs under one.
    budget = int(plain["predicted_peak_bytes"]) - 4 * MIB
    found = trained(*TINY, "--steps", "4", "--memory", str(budget))
    assert found["measured_peak_bytes"] <= budget < found["plain_peak_bytes"]
    assert [line["step"] for line in logged()] == [1, 2, 3, 4]
    again = trained(*TINY, "--steps", "6", "--memory", str(budget), "--resume", "auto")
    assert again["measured_peak_bytes"] <= budget
    assert [line["step"] for line in logged()] == [1, 2, 3, 4, 5, 6]
    assert all(line["peak_bytes"] <= budget for line in logged())
    assert "cuda:0" in Path("runs/python-source/gpt-tiny/log.txt").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_the_demo_runs_and_goes_on_on_the_gpu_that_it_finds() -> None:
    """Its budget is beside the context, which alone takes more."""
    for steps in ("2", "3"):
        found = trained(*demo(), "--steps", steps, *(["--resume", "auto"] if steps == "3" else []))
        assert 270 * MIB < found["measured_peak_bytes"] <= found["budget_bytes"] < found["plain_peak_bytes"]
        assert found["ok"]
    assert "cuda:0" in Path("runs/python-source/demo/log.txt").read_text()
