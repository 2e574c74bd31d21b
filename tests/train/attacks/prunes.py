"""Kill runs while they let go of old checkpoints, before and after each rename and each file that is removed.

After each kill: every folder with a checkpoint's name is a complete one, `latest` and `best` name one, and nothing is
gone that was to stay.  The same command then goes on, and ends with the same bits and the same checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.attacks.runs import differences, newest_step, run_attack, run_folder, start
from tests.train.attacks.subject import words
from tightfit.errors import UnsupportedInput
from tightfit.train.checkpoint import BEST, LATEST, Retention, read_checkpoint

STEPS, SAVE_EVERY = 24, 2
KEPT = Retention(last=2, every=8)
_WORDS = ["--keep-last", "2", "--keep-every", "8", "--eval-every", "4",
          "--eval-dataset", "tests.train.attacks.subject:plain_data"]  # fmt: skip
#: A checkpoint of three files passes six moments when it is let go of.
_AHEAD = 14


def kill_at(moment: int, note: Path) -> Callable[[], None]:
    """For a fork: be killed at the so many-th moment of letting go, and note what was about to be done."""

    def prepare() -> None:
        rename, rmtree = Path.rename, shutil.rmtree
        left = moment

        def pass_by(what: str) -> None:
            nonlocal left
            left -= 1
            if not left:
                note.write_text(what)
                os.kill(os.getpid(), signal.SIGKILL)

        def renamed(self: Path, target: Any) -> Path:
            is_pruned = ".pruned." in Path(target).name
            if is_pruned:
                pass_by("before it loses its name")
            result = rename(self, target)
            if is_pruned:
                pass_by("after it has lost its name")
            return result

        def removed(path: Any, *arguments: Any, **options: Any) -> None:
            is_pruned = ".pruned." in Path(path).name
            if is_pruned:
                for file in sorted(Path(path).iterdir()):
                    pass_by("with some of its files")
                    file.unlink()
                pass_by("without its files")
            rmtree(path, *arguments, **options)
            if is_pruned:
                pass_by("after it is gone")

        Path.rename = renamed  # type: ignore[method-assign]  # in this fork only
        shutil.rmtree = removed  # type: ignore[assignment]  # as above

    return prepare


def steps_there(run: Path) -> set[int]:
    """Of the folders with a checkpoint's name."""
    return {int(path.name.partition("-")[2]) for path in run.glob("checkpoints/step-????????")}


def problems_of(run: Path, every: int = SAVE_EVERY) -> list[str]:
    """Say what is wrong with the checkpoints of a run that was killed."""
    found = []
    newest = newest_step(run)
    for path in run.glob("checkpoints/step-*"):
        try:
            read_checkpoint(path)
        except UnsupportedInput as problem:
            found.append(f"{path.name}: {problem}")
    for name in (LATEST, BEST):
        link = run / "checkpoints" / name
        if link.is_symlink() and not link.exists():
            found.append(f"{name} names {os.readlink(link)}, which is not there")
    saved = range(every, newest + 1, every)
    there = steps_there(run)
    found += [
        f"step {step} is lost"
        for newer, step in enumerate(reversed(saved))
        if KEPT.stays(step, newer) and step not in there
    ]
    return found


def attack(count: int, seed: int, root: Path, output: Path | None) -> bool:
    """Kill so often; print a table, and return whether all was well."""
    chance = random.Random(seed)
    command = [*words(STEPS, SAVE_EVERY), *_WORDS, "--root-path", str(root / "runs")]
    whole = start([*command, "--mark", "whole"], root / "whole.txt")
    assert whole.finish() == 0, whole.said()
    expected = run_folder(root / "runs", "whole")
    kills: Counter[str] = Counter()
    lines: list[dict[str, object]] = []
    wrong = chain = 0
    while sum(kills.values()) < count:
        chain += 1
        mark, of_chain, note = f"run-{chain}", 0, root / "where.txt"
        run = run_folder(root / "runs", mark)
        while True:
            is_enough = sum(kills.values()) >= count
            moment = 10**9 if is_enough else chance.randint(1, _AHEAD)
            code = start([*command, "--mark", mark], root / "said.txt", kill_at(moment, note)).finish()
            if code != -signal.SIGKILL:
                break
            where, problems = note.read_text(), problems_of(run)
            kills[where] += 1
            of_chain += 1
            wrong += bool(problems)
            lines.append({"chain": chain, "where": where, "step": newest_step(run), "problems": problems})
            if problems:
                print(f"run {chain}, killed {where}: {problems}", flush=True)
        said = (root / "said.txt").read_text(errors="replace")
        found = differences(run, expected) if code == 0 else [f"exit {code}: {said}"]
        if steps_there(run) != steps_there(expected):
            found.append(f"checkpoints of {sorted(steps_there(run))}, not of {sorted(steps_there(expected))}")
        wrong += bool(found)
        lines.append({"chain": chain, "ended": code, "differences": found})
        print(f"run {chain}: {of_chain} kills, then {found or 'the same bits'}", flush=True)
    print(f"\n{sum(kills.values())} kills by SIGKILL while a checkpoint is let go of, in {chain} runs, seed {seed}")
    for where, number in sorted(kills.items()):
        print(f"  {where:<28}{number:>5}")
    print(f"  half of a checkpoint taken for one, links to nothing, checkpoints lost, other bits: {wrong}")
    if output is not None:
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return not wrong


if __name__ == "__main__":
    sys.exit(run_attack(attack, __doc__, 40))
