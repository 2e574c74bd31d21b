"""A launcher that is killed takes its processes with it, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.launch.launching import GPT, PATIENCE_S, REAL, TWO, finish, logged, metrics, run, start, torchrun


def _children_of(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "tightfit" in line]


def _is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
@pytest.mark.parametrize(
    "ours", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["tightfit", "torchrun"]
)
def test_no_process_trains_on_without_its_launcher(ours: bool) -> None:
    # Real ones: those of `warm_start` are the children of its server.
    words, command, again = ([*GPT, *TWO], REAL, None) if ours else (GPT, torchrun(2, sys.executable), torchrun(2))
    process = start(*words, "--steps", "100000", "--mark", "m", command=command)
    logged(process, "python-source/m", 2)
    ranks = _children_of(process)
    assert len(ranks) == 2
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while any(map(_is_running, ranks)):
        assert time.monotonic() < deadline, "a rank trains on"
        time.sleep(0.1)
    finish(process)
    saved = max(int(path.name[5:]) for path in Path("runs/python-source/m/checkpoints").glob("step-*"))
    assert saved == metrics("m")[-1]["step"]
    run(*words, "--steps", str(saved + 1), "--mark", "m", "--resume", "auto", command=again)
    assert [line["step"] for line in metrics("m")] == list(range(1, saved + 2))
