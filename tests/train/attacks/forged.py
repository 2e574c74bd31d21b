"""Run folders that somebody else has made up, with digests that are right: refused or read as data, never a traceback.

Fields of `state.json` drawn at random are given other values, lost, or moved; and a list of run folders has links,
pipes, paths and numbers in places where none belong.  Nothing outside the run folder may change.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.train.attacks.runs import run_attack, run_folder, start
from tests.train.attacks.subject import words
from tightfit.train.checkpoint import FORMAT_VERSION
from tightfit.train.manifest import MANIFEST, write_manifest

STEPS, SAVE_EVERY = 8, 4
NEWEST = "checkpoints/step-00000004"
_PATIENCE_S = 120
_VALUES: list[Any] = [
    None, True, -1, 0, 2**63, 10**30, 1.5, 1e308, float("nan"), "", "x", "\ud800", [], [[]], {}, {"tensor": "../x"},
    {"tensor": "model.up.weight"}, {"float": "nan"}, {"float": "x"}, {"bytes": "zz"}, {"tuple": 3}, {"dict": []},
    {"items": [[{}, 1]]}, {"complex": 1}, {"sparse": [1, 2], "size": [10**12]}, {"unknown": 1},
]  # fmt: skip


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield content, key
        yield from _places(content[key])


def _shown(value: Any) -> str:
    return ascii(value)[:40]


def forge_field(state: Any, chance: random.Random) -> str:
    """Change one field of a state; of long lists of numbers, few are chosen.  Returns what was done."""
    places = [(holder, key) for holder, key in _places(state) if not (isinstance(key, int) and key > 8)]
    holder, key = chance.choice(places)
    before = _shown(holder[key])
    how = chance.randrange(6)
    if how == 0:
        del holder[key]
        return f"{key!a} is gone (was {before})"
    if how == 1 and isinstance(holder, dict):
        other, other_key = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key]))
        return f"{key!a} is that of {other_key!a}"
    holder[key] = chance.choice(_VALUES)
    return f"{key!a} is {_shown(holder[key])} (was {before})"


def _write_state(folder: Path, text: str) -> None:
    (folder / "state.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    (folder / MANIFEST).unlink()
    write_manifest(folder, FORMAT_VERSION)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def _manifest_with(run: Path, change: Callable[[Any], object]) -> None:
    path = run / NEWEST / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest, indent=2) + "\n")


def folders(outside: Path) -> dict[str, Callable[[Path], object]]:
    """What may be wrong with a run's folder; `outside` holds a good checkpoint and a file of ours."""
    entry = {"size_bytes": 4, "sha256": hashlib.sha256(b"ours").hexdigest()}

    def naming(name: str) -> Callable[[Path], None]:
        return lambda run: _manifest_with(run, lambda manifest: manifest["files"].update({name: entry}))

    def sized(size: str) -> Callable[[Path], object]:
        def change(run: Path) -> None:
            path = run / NEWEST / MANIFEST
            path.write_text(path.read_text().replace('"size_bytes": ', f'"size_bytes": {size}', 1))

        return change

    def stated(old: str, new: str) -> Callable[[Path], object]:
        return lambda run: _write_state(run / NEWEST, (run / NEWEST / "state.json").read_text().replace(old, new, 1))

    def linked(name: str, target: object) -> Callable[[Path], object]:
        return lambda run: _replace(run / name, lambda path: path.symlink_to(str(target)))

    def written(name: str, text: str) -> Callable[[Path], object]:
        return lambda run: _replace(run / name, lambda path: path.write_text(text))

    def piped(name: str) -> Callable[[Path], object]:
        return lambda run: _replace(run / name, os.mkfifo)

    latest, step = "checkpoints/latest", '"step": 4'
    return {
        "latest leads outside": linked(latest, outside / "step-00000004"),
        "latest leads outside by ..": linked(latest, "../../../../outside/step-00000004"),
        "latest leads to itself": linked(latest, "latest"),
        "latest is a file": written(latest, "step-00000004"),
        "latest is a folder": lambda run: _replace(run / latest, lambda path: shutil.copytree(run / NEWEST, path)),
        "a checkpoint leads to itself": linked(NEWEST, "step-00000004"),
        "a checkpoint leads to one elsewhere": linked(NEWEST, outside / "step-00000004"),
        "a checkpoint is a file": written(NEWEST, ""),
        "an empty checkpoint of step 10**20": lambda run: (run / f"checkpoints/step-{10**20}").mkdir(),
        "checkpoints is a file": written("checkpoints", ""),
        "checkpoints is a pipe": piped("checkpoints"),
        "checkpoints leads to itself": linked("checkpoints", "checkpoints"),
        "the manifest names ../ours": naming("../ours"),
        "the manifest names ..": naming(".."),
        "the manifest names nothing": naming(""),
        "the manifest names /etc/passwd": naming("/etc/passwd"),
        "the manifest names a NUL": naming("a\0b"),
        "the manifest names half a character": naming("\ud800"),
        "the manifest names a file that is not there": naming("training-00007.safetensors"),
        "the manifest names a file twice": lambda run: (run / NEWEST / MANIFEST).write_text(
            (run / NEWEST / MANIFEST).read_text().replace('"state.json": {', '"state.json": {}, "state.json": {')
        ),
        "the manifest has a size of 5,000 digits": sized("9" * 5000),
        "the manifest has a size below 0": sized("-"),
        "the manifest is nested 100,000 deep": written(f"{NEWEST}/{MANIFEST}", "[" * 100_000),
        "the manifest is a pipe": piped(f"{NEWEST}/{MANIFEST}"),
        "the state is a pipe": piped(f"{NEWEST}/state.json"),
        "the tensors are /dev/zero": linked(f"{NEWEST}/training.safetensors", "/dev/zero"),
        "the tensors are a file of ours": linked(f"{NEWEST}/training.safetensors", outside / "ours"),
        "the state has its step twice": stated(step, f"{step}, {step}"),
        "its step is 4.0": stated(step, '"step": 4.0'),
        "its step is a word": stated(step, '"step": "4"'),
        "its step is of 4,000 digits": stated(step, f'"step": {"9" * 4000}'),
        "its step is infinity": stated(step, '"step": Infinity'),
        "the lock leads to a file of ours": linked(".lock", outside / "ours"),
        "the lock leads to nothing": linked(".lock", outside / "a/b"),
        "the lock is a pipe": piped(".lock"),
        "log.txt leads to a file of ours": linked("log.txt", outside / "ours"),
        "metrics.jsonl leads to a file of ours": linked("metrics.jsonl", outside / "ours"),
        "command.txt is a pipe": piped("command.txt"),
        "config.yaml is a folder": lambda run: _replace(run / "config.yaml", Path.mkdir),
        "config.yaml is that of another run": written("config.yaml", "model: gpt-tiny\nseed: 7\nsteps: 3\n"),
        "a row of step 10**30": lambda run: (run / "metrics.jsonl").open("a").write('{"step": 1' + "0" * 30 + "}\n"),
        "a row nested 10,000 deep": lambda run: (run / "metrics.jsonl").open("a").write("[" * 10_000 + "\n"),
        "a row of a step that is a list": lambda run: (run / "metrics.jsonl").open("a").write('{"step": []}\n'),
        "a memory limit of 1 B": written("memory-limit.json", '{"limit_bytes": 1}'),
        "a memory limit of 5,000 digits": written("memory-limit.json", '{"limit_bytes": ' + "9" * 5000 + "}"),
        "something temporary leads outside": linked("checkpoints/.step-1.tmp", outside),
        "something temporary of the run leads outside": linked(".config.yaml.1.tmp", outside),
        "something that was replaced": lambda run: (run / "checkpoints/.step-00000009.replaced.1.tmp").mkdir(),
        "plan.json leads to a file of ours": linked("plan.json", outside / "ours"),
        "the page is a folder": lambda run: _replace(run / "report.html", Path.mkdir),
        "the model is a folder": lambda run: _replace(run / "model.safetensors", Path.mkdir),
        "the model leads to a file of ours": linked("model.safetensors", outside / "ours"),
    }


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path): os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def attack(count: int, seed: int, root: Path, output: Path | None) -> bool:
    """Forge so many fields, and each folder once; print a table, and return whether all was well."""
    runs, outside = root / "runs", root / "outside"
    command = [*words(STEPS, SAVE_EVERY), "--root-path", str(runs)]
    first = start([*command, "--mark", "whole"], root / "whole.txt")
    assert first.finish() == 0, first.said()
    whole = run_folder(runs, "whole")
    outside.mkdir()
    shutil.copytree(whole / NEWEST, outside / "step-00000004")
    (outside / "ours").write_text("ours")
    (outside / ".ours.tmp").write_text("ours")
    shutil.rmtree(whole / "checkpoints/step-00000008")
    (whole / "checkpoints/latest").unlink()
    (whole / "checkpoints/latest").symlink_to("step-00000004")
    before = _digests(outside)

    ended: Counter[str] = Counter()
    lines: list[dict[str, object]] = []

    def attempt(what: str, make: Callable[[Path], object], number: int) -> None:
        run = run_folder(runs, f"forged-{number}")
        shutil.copytree(whole, run, symlinks=True)
        done = make(run)
        what = f"{what}: {done}" if isinstance(done, str) else what
        fork = start([*command, "--mark", run.name], root / "said.txt")
        try:
            code = fork.finish(_PATIENCE_S)
        except AssertionError:
            code = -1
            fork.kill(9)
        said = fork.said()
        problems = []
        if code not in (0, 1, 2):
            problems.append(f"exit {code}")
        if "Traceback" in said:
            problems.append("a traceback")
        if len(said) > 20_000:
            problems.append(f"{len(said)} characters")
        if _digests(outside) != before:
            problems.append("something outside has changed")
        is_field = what.startswith("state.json: ")
        ended[f"{'a field' if is_field else 'a folder'}, exit {code}"] += 1
        last = [line for line in said.splitlines() if line.startswith("tightfit: ")][-1:] or [""]
        lines.append({"forged": what, "exit": code, "said": last[0][-300:], "problems": problems})
        if problems or not is_field:
            print(f"{what:<48} exit {code} {problems or ''}\n    {last[0][-170:]}", flush=True)
        if problems:
            print(said[-1500:], flush=True)
        os.chmod(run, 0o755)
        shutil.rmtree(run)

    for number, (what, make) in enumerate(folders(outside).items()):
        attempt(what, make, number)
    for number in range(count):
        chance = random.Random(f"{seed}:{number}")

        def make(run: Path, chance: random.Random = chance) -> str:
            state = json.loads((run / NEWEST / "state.json").read_text())
            done = forge_field(state, chance)
            _write_state(run / NEWEST, json.dumps(state))
            return done

        attempt("state.json", make, 1000 + number)
    wrong = sum(bool(line["problems"]) for line in lines)
    print(f"\n{len(lines)} forged run folders, seed {seed}")
    for how, often in sorted(ended.items()):
        print(f"  {how:<20}{often:>5}")
    print(f"  tracebacks, other exit codes, hangs, changes outside: {wrong}")
    if output is not None:
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return not wrong


if __name__ == "__main__":
    sys.exit(run_attack(attack, __doc__, 150))
