"""Short forms of the attacks."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.exhaustive
def test_runs_that_are_killed_end_with_the_same_bits() -> None:
    """In a process of its own, which may fork."""
    command = [sys.executable, "-m", "tests.train.attacks.kills", "--count", "2", "--seed", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 kills by SIGKILL" in ended.stdout
