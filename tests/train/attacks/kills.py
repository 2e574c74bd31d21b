"""Kill runs by SIGKILL at random moments, in saves, prunes and the end; the same command must give the same bits.

Every second run keeps one checkpoint only, and lets go of the others slowly, so that some kills fall in between.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.train.attacks.runs import Fork, differences, newest_step, run_attack, run_folder, start
from tests.train.attacks.subject import words

STEPS, SAVE_EVERY = 24, 2
#: Of one run, before it is left alone.
_KILLS = 12
MOMENTS = ("anywhere", "save", "end")
_WEIGHTS = (3, 6, 2)
_KEEP_ONE = ["--keep-last", "1"]


def _saving(run: Path) -> str:
    """Say what is being done to checkpoints at the moment; nothing: it is empty."""
    try:
        with os.scandir(run / "checkpoints") as entries:
            names = [entry.name for entry in entries if entry.name.startswith(".step-")]
    except FileNotFoundError:
        names = []
    return "" if not names else "inside a prune" if any(".pruned." in name for name in names) else "inside a save"


def _prune_slowly() -> None:
    """For a fork: let the removal of a checkpoint take some time, one file after the other."""
    rmtree = shutil.rmtree

    def remove(path: Any, *arguments: Any, **options: Any) -> None:
        if ".pruned." in Path(path).name:
            for file in Path(path).iterdir():
                time.sleep(0.004)
                file.unlink()
            time.sleep(0.004)
        rmtree(path, *arguments, **options)

    shutil.rmtree = remove  # type: ignore[assignment]  # in this fork only


def _wait(fork: Fork, run: Path, moment: str, usual_s: float, chance: random.Random) -> None:
    """Return when the moment has come, or the run has ended."""
    if moment == "anywhere":
        deadline = time.monotonic() + chance.uniform(0, usual_s)
        while time.monotonic() < deadline and not fork.has_ended():
            time.sleep(0.002)
        return
    if moment == "end":
        while newest_step(run) < STEPS and not fork.has_ended():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.15))
        return
    wanted = newest_step(run) + SAVE_EVERY * chance.randint(0, 2)
    while not fork.has_ended():
        if newest_step(run) >= wanted and _saving(run):
            time.sleep(chance.uniform(0, 0.008))
            if _saving(run):
                return
        time.sleep(0.0002)


def attack(count: int, seed: int, root: Path, output: Path | None) -> bool:
    """Kill so often; print a table, and return whether all was well."""
    chance = random.Random(seed)
    command = [*words(STEPS, SAVE_EVERY), "--root-path", str(root / "runs")]
    begun = time.monotonic()
    whole = start([*command, "--mark", "whole"], root / "whole.txt")
    assert whole.finish() == 0, whole.said()
    usual_s = time.monotonic() - begun
    lines = []
    kills: Counter[str] = Counter()
    wrong = 0
    chain = 0
    while sum(kills.values()) < count:
        chain += 1
        mark, of_chain, keeps_one = f"run-{chain}", 0, chain % 2 == 0
        full = [*command, "--mark", mark, *(_KEEP_ONE if keeps_one else [])]
        run = run_folder(root / "runs", mark)
        while True:
            fork = start(full, root / f"{mark}.txt", _prune_slowly if keeps_one else lambda: None)
            before = newest_step(run)
            if of_chain < _KILLS and sum(kills.values()) < count:
                moment = chance.choices(MOMENTS, _WEIGHTS)[0]
                _wait(fork, run, moment, usual_s, chance)
                if not fork.has_ended():
                    fork.kill(signal.SIGKILL)
                    in_end = newest_step(run) >= STEPS
                    where = _saving(run) or ("in the end" if in_end else "elsewhere")
                    kills[where] += 1
                    of_chain += 1
                    is_lost = newest_step(run) < before
                    wrong += is_lost
                    lines.append(
                        {"chain": chain, "meant": moment, "was": where, "step": newest_step(run), "lost": is_lost}
                    )
                    continue
            code = fork.finish()
            found = (
                differences(run, run_folder(root / "runs", "whole")) if code == 0 else [f"exit {code}: {fork.said()}"]
            )
            wrong += bool(found)
            lines.append({"chain": chain, "ended": code, "differences": found})
            print(f"run {chain}: {of_chain} kills, then {found or 'the same bits'}", flush=True)
            break
    print(f"\n{sum(kills.values())} kills by SIGKILL in {chain} runs of {STEPS} steps, seed {seed}")
    for where, number in sorted(kills.items()):
        print(f"  {where:<16}{number:>5}")
    print(f"  checkpoints lost, runs that differ from the uninterrupted one: {wrong}")
    if output is not None:
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return not wrong


if __name__ == "__main__":
    sys.exit(run_attack(attack, __doc__, 120))
