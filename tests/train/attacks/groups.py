"""Groups of processes that are stopped and signalled, joined by a second run, and resumed in other numbers.

What the run says, how it ends, and what the same command (or that of another number of processes) makes of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.attacks.ranks import processes_of, start_group
from tests.train.attacks.runs import differences, newest_step, run_attack, run_folder
from tests.train.attacks.subject import words

STEPS, SAVE_EVERY = 60, 4
_PATIENCE_S = 120
#: Of `--dist-timeout`: so soon a rank that is stopped is named.
_SILENCE_S = 8


def several(strategy: str, processes: int) -> list[str]:
    """The words for a group; one process needs none."""
    if processes == 1:
        return []
    return ["--multiprocessing-distributed", "--nproc-per-node", str(processes), "--strategy", strategy,
            "--dist-timeout", str(_SILENCE_S)]  # fmt: skip


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """Wait until a run has a checkpoint of that step, or has ended."""
    deadline = time.monotonic() + _PATIENCE_S
    while newest_step(run) < step and process.poll() is None:
        assert time.monotonic() < deadline, "it saves nothing"
        time.sleep(0.005)


def send(number: signal.Signals, victim: str) -> Callable[[str, subprocess.Popen[bytes]], None]:
    """Send a signal to a rank or the launcher."""

    def sent(mark: str, process: subprocess.Popen[bytes]) -> None:
        found = {kind: pid for pid, kind in processes_of(mark).items()}
        if victim in found:  # else the run has just ended
            os.kill(found[victim], number)

    return sent


def twice(number: signal.Signals, victim: str, after_s: float) -> Callable[[str, subprocess.Popen[bytes]], None]:
    """Send it again after a moment."""

    def sent(mark: str, process: subprocess.Popen[bytes]) -> None:
        send(number, victim)(mark, process)
        time.sleep(after_s)
        if process.poll() is None:
            send(number, victim)(mark, process)

    return sent


def _summary(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if "tightfit: " in line]
    return (lines or ["(nothing)"])[-1]


class Table:
    """What became of each attack."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[dict[str, object]] = []
        self.wrong = 0

    def add(self, what: str, ended: str, said: str, problems: list[str]) -> None:
        self.wrong += bool(problems)
        self.lines.append({"attack": what, "ended": ended, "said": said, "problems": problems})
        print(f"{what:<46} {ended:<34} {problems or 'and all is well'}\n    {said[:170]}", flush=True)


def signalled(table: Table, strategy: str, command: list[str], count: int) -> None:
    """Signal one process of a group; all must be gone soon, and the same command must end with the same bits."""
    whole = run_folder(table.root / "runs", f"{strategy}-whole")
    attacks: dict[str, tuple[Any, set[int]]] = {
        "SIGSTOP to rank 1": (send(signal.SIGSTOP, "rank 1"), {1}),
        "SIGUSR1 to rank 1": (send(signal.SIGUSR1, "rank 1"), {138}),
        "SIGHUP to the launcher": (send(signal.SIGHUP, "launcher"), {129}),
        "SIGTERM to the launcher, again at once": (twice(signal.SIGTERM, "launcher", 0.3), {143}),
        "SIGSTOP to rank 0": (send(signal.SIGSTOP, "rank 0"), {1}),
        "SIGTERM to rank 0, again at once": (twice(signal.SIGTERM, "rank 0", 0.3), {143}),
        "SIGTERM to rank 1": (send(signal.SIGTERM, "rank 1"), {143}),
        "SIGUSR1 to rank 0": (send(signal.SIGUSR1, "rank 0"), {138}),
        "SIGUSR1 to the launcher": (send(signal.SIGUSR1, "launcher"), {138}),
        "SIGINT to the launcher": (send(signal.SIGINT, "launcher"), {130}),
    }
    attacks = dict(list(attacks.items())[:count])
    for number, (what, (attack, codes)) in enumerate(attacks.items()):
        mark = f"{strategy}-{number}-{os.getpid()}"
        run, output = run_folder(table.root / "runs", mark), table.root / "said.txt"
        # What asks for a process by `warm_start` is stopped without it, and passes no second signal on.
        process = start_group([*command, "--mark", mark], output, warm="SIGSTOP" not in what and "again" not in what)
        wait_for_step(process, run, SAVE_EVERY)
        kept = newest_step(run)
        attack(mark, process)
        begun = time.monotonic()
        problems = []
        try:
            code = process.wait(_PATIENCE_S)
            while processes_of(mark) and time.monotonic() < begun + _PATIENCE_S:
                time.sleep(0.05)
        except subprocess.TimeoutExpired:
            code = -1
        took_s = time.monotonic() - begun
        for pid, kind in processes_of(mark).items():
            problems.append(f"{kind} is still there")
            os.kill(pid, signal.SIGKILL)
        said = _summary(output)
        if code not in codes | {0}:
            problems.append(f"exit {code}")
        if newest_step(run) < kept:
            problems.append("a checkpoint is lost")
        everything = output.read_text(errors="replace")
        if "Traceback" in everything:
            problems.append("a traceback")
        if problems:
            print(everything[-3000:], flush=True)
        again = start_group([*command, "--mark", mark], table.root / "again.txt", warm=True)
        if again.wait() != 0:
            problems.append(f"then exit {again.returncode}: {_summary(table.root / 'again.txt')}")
        else:
            problems += differences(run, whole)
        table.add(f"{strategy}: {what}", f"exit {code}, gone after {took_s:.1f} s", said, problems)


def two_at_once(table: Table, command: list[str]) -> None:
    """Begin a second run in a folder where one trains; the first is not disturbed."""
    mark = f"two-{os.getpid()}"
    run, whole = run_folder(table.root / "runs", mark), run_folder(table.root / "runs", "ddp-whole")
    processes = [start_group([*command, "--mark", mark], table.root / f"{place}.txt", warm=True) for place in range(2)]
    codes = sorted(process.wait() for process in processes)
    said = min(_summary(table.root / f"{place}.txt") for place in range(2))
    problems = differences(run, whole)
    if codes not in ([0, 0], [0, 2]):
        problems.append(f"exits {codes}")
    table.add("ddp: two runs at once in one folder", f"exits {codes}", said, problems)


def other_numbers(table: Table, base: list[str]) -> None:
    """Go on with another number of processes and another strategy at each start; losses must be nearly the same."""
    chain = [("fsdp", 4), ("fsdp", 2), ("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("ddp", 4)]
    mark, here = f"numbers-{os.getpid()}", "tests.train.attacks.subject"
    base = [*base, "--model", f"{here}:plain_model", "--dataset", f"{here}:plain_data", "--schedule", "constant"]
    run = table.root / f"runs/{here}-plain_data" / mark
    problems, said, output = [], [], table.root / "number.txt"
    for place, (strategy, processes) in enumerate(chain, 1):
        last = ["--mark", mark, "--steps", str(4 * place)]
        code = start_group([*base, *several(strategy, processes), *last], output, warm=True).wait()
        said.append(f"{strategy} of {processes}")
        if code != 0:
            problems.append(f"{said[-1]}: exit {code}: {_summary(output)}")
            break
    alone = start_group([*base, "--mark", "alone", "--steps", str(4 * len(chain))], output, warm=True).wait()
    assert alone == 0, output.read_text()
    files = [one / "metrics.jsonl" for one in (run, run.with_name("alone"))]
    losses = [[json.loads(line)["loss"] for line in file.read_text().splitlines()] for file in files]
    if len(losses[0]) != len(losses[1]):
        problems.append(f"{len(losses[0])} rows")
    worst = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=False))
    if worst > 1e-4:
        problems.append(f"losses differ by {worst:.1e}")
    ended = f"losses within {worst:.1e} of one process's"
    table.add(f"resumed by {', '.join(said)}", ended, "", problems)


def attack(count: int, seed: int, root: Path, output: Path | None, strategies: list[str]) -> bool:
    """Send so many of the signals under each strategy, and all else once; return whether all was well."""
    table = Table(root)
    base = [*words(STEPS, SAVE_EVERY), "--root-path", str(root / "runs")]
    for strategy in strategies:
        command = [*base, *several(strategy, 2)]
        whole = start_group([*command, "--mark", f"{strategy}-whole"], root / "whole.txt", warm=True)
        assert whole.wait() == 0, (root / "whole.txt").read_text()
        if strategy == "ddp":
            two_at_once(table, command)
        signalled(table, strategy, command, count)
    other_numbers(table, base)
    print(f"\n{len(table.lines)} attacks; left processes, tracebacks, lost or changed bits: {table.wrong}")
    if output is not None:
        output.write_text("".join(json.dumps(line) + "\n" for line in table.lines))
    return not table.wrong


if __name__ == "__main__":
    sys.exit(run_attack(attack, __doc__, 10, ("ddp", "fsdp")))
