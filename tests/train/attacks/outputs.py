"""Take from a run what it prints to: its terminal, the reader of its pipe, the room for its file, or all of it.

A run is worth more than its lines: it ends as ever, or by the signal of its terminal, with a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.train.attacks.ranks import processes_of
from tests.train.attacks.runs import differences, newest_step, run_attack, run_folder
from tests.train.attacks.subject import words

STEPS, SAVE_EVERY = 24, 2
_PATIENCE_S = 180
_GROUP = ["--multiprocessing-distributed", "--nproc-per-node", "2", "--strategy", "ddp", "--dist-timeout", "60"]


def _wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while newest_step(run) < step and process.poll() is None:
        assert time.monotonic() < deadline, "it saves nothing"
        time.sleep(0.005)


def terminal(command: list[str], run: Path, *, ignores: bool) -> subprocess.Popen[bytes]:
    """Begin in a terminal, and close that after some steps; `ignores`: under nohup."""
    ours, theirs = pty.openpty()

    def in_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        if ignores:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=in_terminal)
    os.close(theirs)

    def read() -> None:
        try:
            while os.read(ours, 4096):
                pass
        except OSError:
            return

    threading.Thread(target=read, daemon=True).start()
    _wait_for_step(process, run, 4)
    hung_up = os.open(os.devnull, os.O_RDWR)
    os.dup2(hung_up, ours)  # closes it though a thread reads
    os.close(hung_up)
    return process


def pipe(command: list[str], run: Path) -> subprocess.Popen[bytes]:
    """Begin before a reader that ends after some steps."""
    ours, theirs = os.pipe()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline = time.monotonic() + _PATIENCE_S
    while newest_step(run) < 4 and process.poll() is None:
        assert time.monotonic() < deadline, "it saves nothing"
        try:
            os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.005)
    os.close(ours)
    return process


def full(command: list[str], run: Path) -> subprocess.Popen[bytes]:
    """Begin with an output that takes nothing."""
    with open("/dev/full", "w") as nowhere:
        return subprocess.Popen(command, stdout=nowhere, stderr=nowhere)


def none(command: list[str], run: Path) -> subprocess.Popen[bytes]:
    """Begin without any output."""
    return subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])


ATTACKS: dict[str, tuple[Callable[[list[str], Path], subprocess.Popen[bytes]], int]] = {
    "its terminal is closed": (lambda command, run: terminal(command, run, ignores=False), 129),
    "its terminal is closed, under nohup": (lambda command, run: terminal(command, run, ignores=True), 0),
    "the reader of its output ends": (pipe, 0),
    "the disk of its output is full": (full, 0),
    "it has no output from the start": (none, 0),
}


def attack(count: int, seed: int, root: Path, output: Path | None) -> bool:
    """Try so many of the attacks, on one process and on a group; return whether all was well."""
    os.environ.setdefault("PYTHONPATH", os.getcwd())
    lines, wrong = [], 0
    tried = [(what, several) for several in ([], _GROUP) for what in ATTACKS]
    chosen = tried if count >= len(tried) else random.Random(seed).sample(tried, count)
    python = [sys.executable, "-m", "tightfit", *words(STEPS, SAVE_EVERY), "--root-path", str(root / "runs")]
    for kind, several in (("one", []), ("group", _GROUP)):
        if any(other == several for _, other in chosen):
            subprocess.run([*python, *several, "--mark", f"whole-{kind}"], check=True, stdout=subprocess.DEVNULL)
    for number, (what, several) in enumerate(chosen):
        kind, mark = "group" if several else "one", f"output-{number}-{os.getpid()}"
        run, whole = (run_folder(root / "runs", name) for name in (mark, f"whole-{'group' if several else 'one'}"))
        make, expected = ATTACKS[what]
        process = make([*python, *several, "--mark", mark], run)
        try:
            code = process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -process.wait()
        deadline = time.monotonic() + 30
        while processes_of(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        problems = [f"{one} is still there" for one in processes_of(mark).values()]
        kept = newest_step(run)
        if code not in (expected, 0):
            problems.append(f"exit {code}")
        again = subprocess.run([*python, *several, "--mark", mark], capture_output=True, text=True)
        problems += (
            differences(run, whole) if again.returncode == 0 else [f"then exit {again.returncode}: {again.stderr}"]
        )
        wrong += bool(problems)
        lines.append({"attack": what, "processes": kind, "exit": code, "kept": kept, "problems": problems})
        print(f"{kind:<6} {what:<38} exit {code:<4} kept {kept:<3} {problems or 'the same bits'}", flush=True)
    print(f"\n{len(lines)} runs that lost their output: {wrong} ended wrongly, or with other bits")
    if output is not None:
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return not wrong


if __name__ == "__main__":
    sys.exit(run_attack(attack, __doc__, 10))
