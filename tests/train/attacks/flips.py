"""Flip bits of a sharded checkpoint and cut its files: none is accepted; plant pickles and false shards: none is run.

The checkpoint is one that a run of two processes under FSDP2 has written.  Flips are spread evenly over the classes of
its fields: each line of the manifest, each kind of token of the state, lengths, headers and each tensor of each shard.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.train.attacks.ranks import start_group
from tests.train.attacks.runs import differences, run_attack, run_folder, start
from tests.train.attacks.subject import words
from tightfit.errors import UnsupportedInput
from tightfit.train.checkpoint import FORMAT_VERSION, newest_checkpoint, read_checkpoint
from tightfit.train.manifest import MANIFEST, write_manifest

STEPS, SAVE_EVERY = 8, 4
SEVERAL = ["--multiprocessing-distributed", "--strategy", "fsdp", "--nproc-per-node", "2"]
_HEADER_LENGTH = 8


def fields_of(file: Path) -> dict[str, list[int]]:
    """The places of a file's bytes, by the class of the field that they are in."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        end = _HEADER_LENGTH + int.from_bytes(content[:_HEADER_LENGTH], "little")
        found = {"length of the header": list(range(_HEADER_LENGTH)), "header": list(range(_HEADER_LENGTH, end))}
        for name, described in json.loads(content[_HEADER_LENGTH:end]).items():
            if name != "__metadata__" and described["data_offsets"][0] < described["data_offsets"][1]:
                begin, stop = (end + offset for offset in described["data_offsets"])
                found[f"tensor {name}"] = list(range(begin, stop))
        return found
    found = {}
    for token in re.finditer(rb'"[^"]*"|-?[0-9.eE+]+|[a-z]+|\s+|.', content):
        kind = {'"': "strings", "{": "signs", "}": "signs", "[": "signs", "]": "signs", ",": "signs", ":": "signs"}.get(
            chr(token[0][0]), "numbers" if token[0][0] in b"-0123456789" else "words" if token[0].isalpha() else "space"
        )
        found.setdefault(kind, []).extend(range(*token.span()))
    return found


def damages(folder: Path, count: int, chance: random.Random) -> Iterator[tuple[str, Path, bytes]]:
    """So many flips, at least one of each class, and a cut in each: what, where, and the new content."""
    classes = [(file, name, places) for file in sorted(folder.iterdir()) for name, places in fields_of(file).items()]
    each = -(-count // len(classes))
    for file, name, places in classes:
        content = file.read_bytes()
        what = "a tensor" if name.startswith("tensor ") else name
        for number in range(each):
            place = places[number % len(places)] if len(places) <= each else chance.choice(places)
            flipped = bytearray(content)
            flipped[place] ^= 1 << chance.randrange(8)
            yield f"{file.name}: {what}", file, bytes(flipped)
        yield f"{file.name}: cut", file, content[: chance.choice(places)]


def _flip(folder: Path, count: int, chance: random.Random) -> tuple[Counter[str], list[str]]:
    tried: Counter[str] = Counter()
    accepted = []
    for what, file, damaged in damages(folder, count, chance):
        content = file.read_bytes()
        file.write_bytes(damaged)
        tried[what] += 1
        try:
            read_checkpoint(folder)
            accepted.append(what)
        except UnsupportedInput:
            pass
        finally:
            file.write_bytes(content)
    return tried, accepted


class Harmful:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._trace,)


def _forged_header(file: Path, change: Any) -> None:
    content = file.read_bytes()
    end = _HEADER_LENGTH + int.from_bytes(content[:_HEADER_LENGTH], "little")
    header = json.loads(content[_HEADER_LENGTH:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(_HEADER_LENGTH, "little") + text + content[end:])


def forgeries(folder: Path, trace: Path) -> dict[str, Any]:
    """What somebody may do to a checkpoint who can also count digests; each is a call that does it."""

    def renamed(header: dict[str, Any], new: Any) -> None:
        key = next(key for key in header if "," in key.partition("@")[2])
        header[new(key)] = header.pop(key)

    def planted(name: str) -> Any:
        return lambda: (folder / name).write_bytes(pickle.dumps(Harmful(trace)))

    def state_with(change: Any) -> Any:
        def forge() -> None:
            state = json.loads((folder / "state.json").read_text())
            change(state)
            (folder / "state.json").write_text(json.dumps(state))

        return forge

    second = folder / "training-00001.safetensors"
    found = {f"a pickle as {file.name}": planted(file.name) for file in sorted(folder.iterdir())}
    found |= {
        "a pickle as training-00002.safetensors": planted("training-00002.safetensors"),
        "a pickle as .metadata": planted(".metadata"),
        "a shard twice": lambda: shutil.copy(second, folder / "training-00002.safetensors"),
        "a shard that is gone": second.unlink,
        "a shard at 10**15": lambda: _forged_header(
            second, lambda header: renamed(header, lambda key: key.partition("@")[0] + "@1000000000000000,0")
        ),
        "a shard at other places": lambda: _forged_header(
            second, lambda header: renamed(header, lambda key: key.partition("@")[0] + "@1,0")
        ),
        "a header of 2**63 bytes": lambda: second.write_bytes((2**63).to_bytes(8, "little") + b"{}"),
        "a state nested 100,000 deep": lambda: (folder / "state.json").write_text("[" * 100_000),
        "a state without tensors": state_with(lambda state: state.pop("training")),
        "a state of step 10**30": state_with(lambda state: state.update(step=10**30)),
        "a state that names no tensor": state_with(
            lambda state: state["training"]["dict"]["model"].update({"dict": {"up.weight": {"tensor": "../x"}}})
        ),
    }
    return found


def attack(count: int, seed: int, root: Path, output: Path | None) -> bool:
    """Flip so often; print a table, and return whether all was well."""
    chance = random.Random(seed)
    runs = root / "runs"
    command = [*words(STEPS, SAVE_EVERY), "--root-path", str(runs)]
    said = root / "said.txt"
    assert start_group([*command, *SEVERAL, "--mark", "whole"], said, warm=True).wait() == 0, said.read_text()
    run = run_folder(runs, "whole")
    folder = (run / "checkpoints/latest").resolve()
    tried, accepted = _flip(folder, count, chance)
    for what, number in sorted(tried.items()):
        print(f"  {what:<60}{number:>6}  accepted {accepted.count(what)}")
    print(f"{sum(tried.values())} flips and cuts of a checkpoint of two shards, seed {seed}: {len(accepted)} accepted")
    lines: list[dict[str, object]] = [
        {"damage": w, "tried": n, "accepted": accepted.count(w)} for w, n in tried.items()
    ]
    wrong = len(accepted)

    # Of each file one flip, and the same command: the checkpoint before is used, and the end is the same.
    for file in sorted(path.name for path in folder.iterdir()):
        damaged = run_folder(runs, f"damaged-{file}")
        shutil.copytree(run, damaged, symlinks=True)
        (damaged / "model.safetensors").unlink()
        victim = damaged / "checkpoints/latest" / file
        content = bytearray(victim.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
        code = start_group([*command, *SEVERAL, "--mark", damaged.name], said, warm=True).wait()
        is_said = "is damaged: it is set aside as" in said.read_text()
        problems = differences(damaged, run) if code == 0 and is_said else [f"exit {code}: {said.read_text()}"]
        wrong += bool(problems)
        print(
            f"  a bit of {file} flipped, then the same command: {problems or 'set aside, and the same bits'}",
            flush=True,
        )
        lines.append({"flipped": file, "differences": problems})

    # Forged, with digests that are right: refused, and nothing is executed or written elsewhere.
    trace = root / "executed"
    for number, what in enumerate(forgeries(folder, trace)):
        forged = run_folder(runs, f"forged-{number}")
        shutil.copytree(run, forged, symlinks=True)
        shutil.rmtree(forged / "checkpoints/step-00000004")
        victim_folder = (forged / "checkpoints/latest").resolve()
        forgeries(victim_folder, trace)[what]()
        if what != f"a pickle as {MANIFEST}":
            (victim_folder / MANIFEST).unlink()
            write_manifest(victim_folder, FORMAT_VERSION)
        before = {path for path in root.rglob("*") if forged not in path.parents}
        refused = start([*command, "--mark", forged.name], said)
        code = refused.finish()
        made = {path for path in root.rglob("*") if forged not in path.parents} - before
        lines_said = [line for line in refused.said().splitlines() if line.startswith("tightfit: ")] or [refused.said()]
        # A file that nothing reads does no harm.
        is_wrong = (
            code not in ((0, 2) if what == "a pickle as .metadata" else (2,))
            or "Traceback" in refused.said()
            or bool(made)
        )
        wrong += is_wrong
        print(f"  {what:<44} exit {code} {f'WRONG {made}' if is_wrong else ''}", flush=True)
        print(f"      {lines_said[-1][-170:]}", flush=True)
        lines.append({"forged": what, "exit": code, "said": lines_said[-1], "made": sorted(map(str, made))})
    assert newest_checkpoint(run / "checkpoints") is not None
    print(f"flips and cuts that are accepted, runs that differ, forgeries that are not refused: {wrong}")
    if output is not None:
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return not wrong


if __name__ == "__main__":
    sys.exit(run_attack(attack, __doc__, 4000))
