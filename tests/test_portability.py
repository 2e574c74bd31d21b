"""What other systems and a first look at the package need: modules that only POSIX has are optional, and importing is
quick.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: As on Windows. What PyTorch imports at its start is not ours to do without.
BLOCK = """
import os, signal, sys
import torch, torch.profiler, torch.distributed.elastic.agent.server.api
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for name in ("sysconf", "sched_getaffinity", "getuid", "geteuid", "fork", "killpg", "setsid", "uname", "getloadavg"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT"):
    delattr(signal, name)
"""
TRAIN = """
import tightfit
from torch import nn
from tightfit.cli.main import main
model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
with tightfit.fit(model, torch.randn(512, 64), budget="900KiB", loss=lambda m, b: m(b).sum()) as applied:
    assert not applied.plan.is_plain
assert main(["train", "--model", "lstm-tiny", "--steps", "1", "--root-path", sys.argv[1]]) == 0
assert main(["doctor"]) == 0
"""
IMPORTED = "import sys, torch\nbefore = set(sys.modules)\nimport tightfit\nprint(*sorted(set(sys.modules) - before))"


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_what_only_posix_has(tmp_path: Path) -> None:
    assert "self-test passed" in run(BLOCK + TRAIN, str(tmp_path))


def test_importing_leaves_the_engine_for_its_first_use() -> None:
    """It takes a fifth of a second: people who only want `tightfit.Plan`, or a quick `--help`, do not wait for it."""
    imported = run(IMPORTED).split()
    assert "tightfit.records.plan" in imported
    assert len(imported) < 40, imported
