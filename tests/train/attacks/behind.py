"""Shards that are written while steps go on: a rank killed in the midst, saves that overtake each other, full disks.

Two processes under FSDP2, each of which writes its part of a checkpoint in a thread.  No checkpoint may be half of one,
or lost, and the same command must end with the bits of a run whose saves were quick.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.train.attacks.ranks import processes_of, start_group
from tests.train.attacks.runs import differences, newest_step, run_attack, run_folder
from tests.train.attacks.subject import words
from tightfit.errors import UnsupportedInput
from tightfit.train.checkpoint import read_checkpoint

STEPS, SAVE_EVERY = 24, 4
_SLOW_S = 1.5
#: What is left after it is an orphan.
_MOST_S = 30
_PATIENCE_S = 120
_VICTIMS = ("rank 0", "rank 1", "launcher")
_SEVERAL = ["--multiprocessing-distributed", "--nproc-per-node", "2", "--strategy", "fsdp", "--dist-timeout", "60",
            "--memory", "64MiB", "--model", "tests.train.attacks.slow_saves:model"]  # fmt: skip


def _begin(
    command: list[str], mark: str, output: Path, *, warm: bool = True, **environment: str
) -> subprocess.Popen[bytes]:
    """Start a group, which sees these variables."""
    os.environ.update(environment)
    try:
        return start_group([*command, "--mark", mark], output, warm=warm)
    finally:
        for name in environment:
            del os.environ[name]


def incomplete(run: Path) -> list[str]:
    """Say which folders with a checkpoint's name are not one."""
    found = []
    for folder in run.glob("checkpoints/step-*"):
        try:
            read_checkpoint(folder)
        except UnsupportedInput as problem:
            found.append(str(problem))
    return found


def killed(command: list[str], root: Path, count: int, chance: random.Random, whole: Path) -> tuple[list[str], int]:
    """Kill one of the processes while a part is being written, so often; then let the same command end."""
    lines, wrong = [], 0
    mark, notes = f"behind-{os.getpid()}", root / "notes"
    run = run_folder(root / "runs", mark)
    kills: Counter[str] = Counter()
    ends = 0
    while True:
        notes.mkdir(exist_ok=True)
        for note in notes.iterdir():
            note.unlink()
        is_enough = sum(kills.values()) >= count
        before = newest_step(run)
        slow = {} if is_enough else {"SLOW_SAVES": f"{_SLOW_S}:{notes}"}
        process = _begin(command, mark, root / "killed.txt", warm=is_enough, **slow)
        writer, saves = chance.choice(("0", "1")), chance.randint(1, 3)
        deadline = time.monotonic() + _PATIENCE_S
        while not is_enough and len(list(notes.glob(f"{writer}-*"))) < saves and process.poll() is None:
            assert time.monotonic() < deadline, "it saves nothing"
            time.sleep(0.005)
        there = {kind: pid for pid, kind in processes_of(mark).items()}
        victim = chance.choices(_VICTIMS, (3, 3, 1))[0]
        if is_enough or process.poll() is not None or victim not in there:
            code = process.wait()
            found = differences(run, whole) if code == 0 else [f"exit {code}: {(root / 'killed.txt').read_text()}"]
            wrong += bool(found)
            ends += 1
            print(f"{sum(kills.values())} kills, then {found or 'the same bits'}", flush=True)
            if is_enough or found:
                break
            mark = f"behind-{os.getpid()}-{ends}"
            run = run_folder(root / "runs", mark)
            continue
        time.sleep(chance.uniform(0, _SLOW_S))
        os.kill(there[victim], signal.SIGKILL)
        moment = time.monotonic()
        while processes_of(mark) and time.monotonic() < moment + _MOST_S:
            time.sleep(0.05)
        gone_s, orphans = time.monotonic() - moment, list(processes_of(mark).values())
        process.wait()
        problems = incomplete(run) + [f"{orphan} is still there" for orphan in orphans]
        if newest_step(run) < before:
            problems.append("a checkpoint is lost")
        wrong += bool(problems)
        kills[victim] += 1
        what = f"{victim} killed while rank {writer} writes, newest step {newest_step(run)}, gone after {gone_s:.1f} s"
        lines.append(json.dumps({"attack": what, "problems": problems}))
        print(f"{what} {problems or ''}", flush=True)
    return lines, wrong


def overtaken(command: list[str], root: Path, whole: Path) -> list[str]:
    """Let each save be asked for while the one before is still being written."""
    mark, notes = f"overtaken-{os.getpid()}", root / "notes"
    process = _begin([*command, "--save-every", "1"], mark, root / "said.txt", SLOW_SAVES=f"0.4:{notes}")
    code, run = process.wait(), run_folder(root / "runs", mark)
    there = len(list(run.glob("checkpoints/step-*")))
    return (
        incomplete(run)
        + differences(run, whole)
        + ([f"exit {code}"] if code else [])
        + ([] if there == STEPS else [f"{there} checkpoints of {STEPS} steps"])
    )


def failing(command: list[str], root: Path, rank: int, whole: Path) -> list[str]:
    """Let there be no room for one part of the second checkpoint."""
    mark, output = f"failing-{rank}-{os.getpid()}", root / "said.txt"
    process = _begin(command, mark, output, FAILING_SAVE=f"{rank}:{2 * SAVE_EVERY}")
    code, run, said = process.wait(), run_folder(root / "runs", mark), output.read_text(errors="replace")
    told = f"the checkpoint of step {2 * SAVE_EVERY} could not be written"
    there = {int(path.name[5:]) for path in run.glob("checkpoints/step-*")}
    wanted = set(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)) - {2 * SAVE_EVERY}
    problems = incomplete(run) + differences(run, whole) + ([f"exit {code}: {said[-500:]}"] if code else [])
    if said.count(told) != 1 or "No space left on device" not in said:
        problems.append(f"told {said.count(told)} times")
    if there != wanted:
        problems.append(f"checkpoints of {sorted(there)}")
    return problems


def attack(count: int, seed: int, root: Path, output: Path | None) -> bool:
    """Kill so often, and try all else once; print a table, and return whether all was well."""
    command = [*words(STEPS, SAVE_EVERY), *_SEVERAL, "--root-path", str(root / "runs")]
    first = _begin(command, "whole", root / "whole.txt")
    assert first.wait() == 0, (root / "whole.txt").read_text()
    whole = run_folder(root / "runs", "whole")
    lines, wrong = killed(command, root, count, random.Random(seed), whole)
    for what, problems in (
        ("each save asked for while the last is being written", overtaken(command, root, whole)),
        ("no room for rank 0's part of one checkpoint", failing(command, root, 0, whole)),
        ("no room for rank 1's part of one checkpoint", failing(command, root, 1, whole)),
    ):
        wrong += bool(problems)
        lines.append(json.dumps({"attack": what, "problems": problems}))
        print(f"{what}: {problems or 'the same bits'}", flush=True)
    print(f"\n{count} kills while shards are written, seed {seed}")
    print(f"  orphans, halves of checkpoints, checkpoints lost, runs that differ: {wrong}")
    if output is not None:
        output.write_text("".join(f"{line}\n" for line in lines))
    return not wrong


if __name__ == "__main__":
    sys.exit(run_attack(attack, __doc__, 10))
