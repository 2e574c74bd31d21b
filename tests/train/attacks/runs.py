"""Starting a run in a fork of this process, which has imported everything, and comparing what two runs left."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.train.attacks.subject import DATASET
from tightfit.cli.main import main


@dataclass
class Fork:
    """A run in a process of its own."""

    pid: int
    output: Path
    code: int | None = None

    def has_ended(self) -> bool:
        """Whether it has; then `code` says how."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def finish(self, timeout_s: float = 600) -> int:
        """Wait for it; it must end."""
        deadline = time.monotonic() + timeout_s
        while not self.has_ended():
            assert time.monotonic() < deadline, f"it does not end: {self.said()}"
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def kill(self, number: int) -> int:
        """Send a signal and wait for the end."""
        if not self.has_ended():
            os.kill(self.pid, number)
        return self.finish()

    def said(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace")


def start(words: list[str], output: Path, prepare: Callable[[], object] = lambda: None) -> Fork:
    """Run ``tightfit`` with these words; nothing here has used PyTorch before, so that a fork is safe."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Fork(pid, output)
    code = 99
    try:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        prepare()
        code = main(words)
        sys.stdout.flush()
    finally:
        os._exit(code)


def run_folder(root: Path, mark: str) -> Path:
    """Where a run of the subject lies."""
    return root / DATASET / mark


def newest_step(run: Path) -> int:
    """Of the checkpoint that ``latest`` names; 0: there is none."""
    try:
        return int(os.readlink(run / "checkpoints" / "latest").partition("-")[2])
    except OSError:
        return 0


def differences(run: Path, whole: Path) -> list[str]:
    """Say in what a finished run differs from the uninterrupted one: bits of everything that training makes."""
    found = []
    latest = "checkpoints/latest"
    shards = {path.name for one in (run, whole) for path in (one / latest).glob("*.safetensors")}
    for name in ("model.safetensors", *(f"{latest}/{shard}" for shard in sorted(shards))):
        if (
            not (run / name).exists()
            or not (whole / name).exists()
            or (run / name).read_bytes() != (whole / name).read_bytes()
        ):
            found.append(name)
    if _state(run) != _state(whole):
        found.append("state.json")
    if _rows(run) != _rows(whole):
        found.append("metrics.jsonl")
    left = [path.name for path in (*run.glob(".*"), *run.glob("checkpoints/.*"))]
    if left:
        found.append(f"left behind: {left}")
    if not (run / "report.html").exists():
        found.append("report.html")
    return found


def _state(run: Path) -> Any:
    return json.loads((run / "checkpoints/latest/state.json").read_text())


def _rows(run: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], row["epoch"], row["loss"], row["lr"], row["gradient_norm"]] for row in rows]


def run_attack(attack: Callable[..., bool], description: str | None, count: int, strategies: Sequence[str] = ()) -> int:
    """Read the command line, attack `count` times unless it says how often, and return the exit code.

    Where there are several strategies, `attack` is given those that the command line names, or all.
    """
    parser = argparse.ArgumentParser(description=description)
    if strategies:
        parser.add_argument("--strategy", choices=strategies, help="only this one, not all of them")
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a file for one line of JSON for each kill and each end")
    options = parser.parse_args()
    chosen = [[options.strategy] if options.strategy else list(strategies)] if strategies else []
    with tempfile.TemporaryDirectory(prefix="attack-") as root:
        return 0 if attack(options.count, options.seed, Path(root), options.output, *chosen) else 1
