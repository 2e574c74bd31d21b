"""Kill ranks and launchers of two processes; no process may outlive its run, and the same command must end it."""

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

from tests.support import warm_start
from tests.train.attacks.runs import differences, newest_step, run_attack, run_folder
from tests.train.attacks.subject import words

STEPS, SAVE_EVERY = 40, 4
#: What is left after it is an orphan.
_MOST_S = 30
#: Then an attack is given up.
_MOST_WRONG = 5
_STRATEGIES = ("fsdp", "ddp")
_VICTIMS = ("launcher", "rank 0", "rank 1")
_WEIGHTS = (2, 3, 3)


def processes_of(mark: str) -> dict[int, str]:
    """Return the processes of a run, by what they are."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                environment = (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if mark.encode() in command and state != "Z":
                rank = next((e.partition(b"=")[2].decode() for e in environment if e.startswith(b"RANK=")), None)
                found[int(folder.name)] = "launcher" if rank is None else f"rank {rank}"
    return found


def start_group(command: list[str], output: Path, *, warm: bool = False) -> subprocess.Popen[bytes]:
    """Start ``tightfit`` with these words; `warm`: by `tests.support.warm_start`, which is quicker.

    A process of that ends with whoever has asked for it, so it cannot outlive its launcher: only a real one shows that.
    """
    os.environ.setdefault("PYTHONPATH", os.getcwd())
    with output.open("wb") as stream:
        python = warm_start.python() if warm else sys.executable
        return subprocess.Popen([python, "-m", "tightfit", *command], stdout=stream, stderr=stream)


def _wait(process: subprocess.Popen[bytes], run: Path, more_s: float) -> None:
    """Wait until training has begun, and some time more; or until it has ended."""
    rows = run / "metrics.jsonl"
    before = rows.stat().st_mtime_ns if rows.exists() else 0
    while not (rows.exists() and rows.stat().st_mtime_ns != before) and process.poll() is None:
        time.sleep(0.01)
    moment = time.monotonic() + more_s
    while time.monotonic() < moment and process.poll() is None:
        time.sleep(0.01)


def attack(count: int, seed: int, root: Path, output: Path | None, strategies: list[str]) -> bool:
    """Kill so often under all of the strategies together; print a table, and return whether all was well."""
    chance = random.Random(seed)
    lines = []
    kills: Counter[str] = Counter()
    slowest_s, wrong = 0.0, 0
    several = ["--multiprocessing-distributed", "--nproc-per-node", "2", "--dist-timeout", "60"]
    for place, strategy in enumerate(strategies):
        share = count * (place + 1) // len(strategies) - count * place // len(strategies)
        command = [*words(STEPS, SAVE_EVERY), *several, "--strategy", strategy, "--root-path", str(root / "runs")]
        whole, mark = f"{strategy}-whole-{os.getpid()}", f"{strategy}-killed-{os.getpid()}"
        start_group(["models"], root / "models.txt", warm=True).wait()  # so that its server is there
        begun = time.monotonic()
        assert start_group([*command, "--mark", whole], root / "whole.txt", warm=True).wait() == 0, (
            root / "whole.txt"
        ).read_text()
        usual_s = time.monotonic() - begun
        done = 0
        while True:
            (victim,) = chance.choices(_VICTIMS, _WEIGHTS)
            process = start_group([*command, "--mark", mark], root / "killed.txt", warm=victim != "launcher")
            _wait(process, run_folder(root / "runs", mark), chance.uniform(0, 0.5) * usual_s)
            there = {kind: pid for pid, kind in processes_of(mark).items()}
            if done == share or process.poll() is not None or victim not in there:
                code = process.wait()
                if code == 0 and done < share:  # it ended before it was killed: another run
                    found = differences(run_folder(root / "runs", mark), run_folder(root / "runs", whole))
                    wrong += bool(found)
                    lines.append({"strategy": strategy, "differences": found})
                    print(f"{strategy}: then {found or 'the same bits'}", flush=True)
                    mark = f"{strategy}-killed-{os.getpid()}-{done}"
                    continue
                if code == 0:
                    break
                wrong += 1
                said = (root / "killed.txt").read_text(errors="replace")[-600:]
                print(f"{strategy}: the same command ends with exit code {code}: {said}", flush=True)
                lines.append({"strategy": strategy, "exit": code, "said": said})
                if wrong > _MOST_WRONG:
                    return False
                continue
            os.kill(there[victim], signal.SIGKILL)
            killed = time.monotonic()
            while processes_of(mark) and time.monotonic() < killed + _MOST_S:
                time.sleep(0.05)
            gone_s = time.monotonic() - killed
            orphans = list(processes_of(mark).values())
            wrong += bool(orphans)
            process.wait()
            done += 1
            kills[f"{victim}, {strategy}"] += 1
            slowest_s = max(slowest_s, gone_s)
            step = newest_step(run_folder(root / "runs", mark))
            lines.append({"strategy": strategy, "victim": victim, "step": step, "gone_s": gone_s, "orphans": orphans})
            print(
                f"{strategy}: {victim} killed, step {step}, all gone after {gone_s:.1f} s {orphans or ''}", flush=True
            )
        found = differences(run_folder(root / "runs", mark), run_folder(root / "runs", whole))
        wrong += bool(found)
        lines.append({"strategy": strategy, "differences": found})
        print(f"{strategy}: then {found or 'the same bits'}", flush=True)
    print(f"\n{sum(kills.values())} kills by SIGKILL, seed {seed}; all processes gone after {slowest_s:.1f} s at most")
    for victim, number in sorted(kills.items()):
        print(f"  {victim:<16}{number:>5}")
    print(f"  orphans after {_MOST_S} s, runs that differ from the uninterrupted one: {wrong}")
    if output is not None:
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return not wrong


if __name__ == "__main__":
    sys.exit(run_attack(attack, __doc__, 30, _STRATEGIES))
