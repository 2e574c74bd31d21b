"""Sharded models under `memory_cap=True`: no trial step runs out of memory, which FSDP2 could not leave."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_trial_that_takes_more_than_predicted_is_repaired() -> None:
    """The cap is set after it; with the cap before, the first of these ran out."""
    command = [sys.executable, "-m", "tests.emulated_cuda.sharded_fits", "--most", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"rank {rank}: 0 of 2 fits ran out of memory" in done.stdout
    assert "OVER THE BUDGET" not in done.stdout


@pytest.mark.slow
def test_on_a_full_card_a_budget_is_refused_or_kept_and_nothing_runs_out() -> None:
    command = [sys.executable, "-m", "tests.emulated_cuda.sharded_fits", "--full", "--most", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"rank {rank}: 0 of 2 fits ran out of memory" in done.stdout
    assert "refused" in done.stdout  # the smallest budget by the prediction alone
    assert "measured" in done.stdout
    assert "OVER THE BUDGET" not in done.stdout
