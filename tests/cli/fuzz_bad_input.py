"""Malformed command lines and files: an exit code of the contract, three beats, never a traceback.

python -m tests.cli.fuzz_bad_input --count 500 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tightfit.cli.main import main as tightfit_main
from tightfit.cli.options import FrontierOptions, PlanOptions, TrainOptions, VerifyOptions
from tightfit.cli.setting import settings_of

#: What is right with these words is quick.
TINY = ["--model", "lstm-tiny", "--batch-size", "2"]
COMMANDS = {"train": TrainOptions, "plan": PlanOptions, "frontier": FrontierOptions, "verify": VerifyOptions}
NASTY = [
    "", " ", "\t", "-", "--", "=", "0", "-1", "1e400", "nan", "-inf", "9" * 600, "1" * 30, "٣", "½", "1_000", "0x10",
    "\ud800", "💥", "a" * 300, "a/" * 200, "../..", "/", "/dev/null", "/proc/self/mem", "/etc/passwd", "~", "$HOME",
    ".", "null", "true", "[1, 2]", "{", "{}", "!!python/object/apply:os.system [true]", "&a [*a]", "1GiB2", "8 PiB",
    "-5GiB", "1e30GiB", "200%", "-3%", "%", "auto", "key", "=1", "a=b=c", "a=[1", "package.module:factory", ":", "a:",
    ":b", "os:system", "json:loads", "transformers:", "transformers:/", "cuda:99", "cpu:1", "meta", "xla", "file:///",
    "tcp://", "tcp://a:b",
]  # fmt: skip
_JSONS: list[Any] = [
    None, True, -1, 10**30, 1e308, "", "x" * 1000, [], {}, [[]], {"a": {"b": [None]}}, float("nan"), "\ud800",
]  # fmt: skip


@dataclass
class Case:
    """One call of the command line."""

    words: list[str]
    what: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    case: Case
    code: int | None
    said: str
    seconds: float

    @property
    def problem(self) -> str:
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if "Traceback" in self.said:
            return "a traceback"
        if self.code and not self.said.strip():
            return "it says nothing"
        if self.seconds > 60:
            return f"{self.seconds:.0f} s of processor time"
        if len(self.said) > 20_000:
            return f"{len(self.said)} characters"
        return ""


def damaged_json(rng: random.Random, text: str) -> str:
    """A document in which a few things are others, are missing, or lie much deeper."""
    content = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(content))
        if not places:
            break
        holder, key = rng.choice(places)
        choice = rng.randrange(4)
        if choice == 0:
            del holder[key]
        elif choice == 1 and isinstance(holder[key], int | float):
            holder[key] = rng.choice([-holder[key], holder[key] * 1000, 2**63, 0])
        else:
            holder[key] = rng.choice(_JSONS)
    found = json.dumps(content)
    cut = rng.randrange(8)
    if cut == 0:
        return found[: rng.randrange(len(found))]
    if cut == 1:
        return found.replace("{", "[" * 3000 + "{", 1)
    return found


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield content, key
        yield from _places(content[key])


class Generator:
    """Makes cases in a folder of its own, from a run, a plan and files that are right."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0
        self._run = folder / "runs/co2/right"
        words = ["train", *TINY, "--steps", "2", "--mark", "right", "--log-every", "1", "--save-every", "1"]
        assert call(words).code == 0
        self._plan = (self._run / "plan.json").read_text(encoding="utf-8")
        #: Each with how often it is drawn.
        self.kinds: list[tuple[int, Callable[[random.Random], Case]]] = [
            (6, self.flag), (2, self.pair), (3, self.yaml), (3, self.data), (2, self.plan), (3, self.report),
            (2, self.resumed), (2, self.transformers), (1, self.cost_cache),
        ]  # fmt: skip

    def draw(self, rng: random.Random) -> Case:
        (kind,) = rng.choices([kind for _, kind in self.kinds], [often for often, _ in self.kinds])
        return kind(rng)

    def _new(self, name: str) -> Path:
        self._made += 1
        path = self._folder / f"{self._made}-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _train(self, *words: str) -> list[str]:
        self._made += 1
        return ["train", *TINY, "--steps", "1", "--mark", f"m{self._made}", *words]

    def flag(self, rng: random.Random) -> Case:
        command = rng.choice(list(COMMANDS))
        setting = rng.choice(settings_of(COMMANDS[command]))
        words = self._train() if command == "train" else [command, *TINY]
        nasty = rng.choice(NASTY)
        form = [f"{setting.flag}={nasty}"] if rng.random() < 0.3 else [setting.flag, nasty]
        return Case([*words, *form], f"{command} {setting.flag} {nasty[:30]!r}")

    def pair(self, rng: random.Random) -> Case:
        words = [rng.choice(["MODEL.NAME", "lr", "STEPS", "A.B.C", "model_args.x", "dataset_args", *NASTY])]
        words += [rng.choice(NASTY)] if rng.random() < 0.8 else []
        return Case([*self._train(), *words], f"pair {[word[:30] for word in words]}")

    def yaml(self, rng: random.Random) -> Case:
        path = self._new("run.yaml")
        key = rng.choice([setting.name for setting in settings_of(TrainOptions)])
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
        )
        text = rng.choice([
            f"{key}: {rng.choice(NASTY)}", f"{key}: [[[[1]]]]", f"{key}: {{a: {{b: 1}}}}", f"{key}: 2020-01-01",
            f"{key}: !!binary aGVsbG8=", f"{key}: !!python/name:os.system", f"{key}:\n  - 1\n  - 2", "- a\n- b", "a",
            "", f"{key}: 1\n{key}: 2", "? [a]\n: 1", "[" * 3000, f"{key}: " + "{a: " * 500 + "1" + "}" * 500, bomb,
            f"{bomb}{key}: *i", f"{key}: &x [*x]", "\x00", "1: 2", "null: 3", f"{key}: 0o17", f"{key}: 1e999", "%",
            "---\n---", f"{key}: '{'9' * 5000}'", f"{key}: {'9' * 5000}",
        ])  # fmt: skip
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return Case([*self._train(), "--config-file", str(path)], f"yaml {text[:60]!r}")

    def data(self, rng: random.Random) -> Case:
        suffix = rng.choice([".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet", ".png", ""])
        path = self._new(f"data{suffix}")
        content = rng.choice([
            b"", b"\n" * 100, b"\x00" * 2000, bytes(range(256)) * 20, b"a,b\n" + b"1\n" * 50,
            b"label,text\n" + b'"' * 999, b"date,value\n" + b"x,y\n" * 300, b"date,value\n2020,1\n" * 3,
            b'{"text": 1}\n' * 50, b"[" * 100_000, b'{"text": ' * 5000, b"a" * 300_000,
            b'[{"text": "x", "label": null}]', b"\xff\xfe" + b"a\x00" * 500, b"text\n" + b"word " * 20_000,
            b"a;b;c\n" + b"1,5;?;\n" * 200, b"PK\x03\x04" + b"x" * 100,
        ])  # fmt: skip
        if rng.random() < 0.2:
            (path / "cat").mkdir(parents=True)
            (path / "cat/a.png").write_bytes(content)
            (path / "dog").mkdir()
        else:
            path.write_bytes(content)
        model = rng.choice(["lstm-tiny", "gpt-tiny", "resnet-tiny"])
        return Case(
            [*self._train("--dataset", str(path), "--model", model, "--sequence-length", "16")],
            f"data {model} {suffix} {content[:30]!r}",
        )

    def plan(self, rng: random.Random) -> Case:
        path = self._new("plan.json")
        path.write_text(damaged_json(rng, self._plan), encoding="utf-8", errors="surrogatepass")
        return Case(["verify", *TINY, "--plan", str(path)], f"plan {path.name}")

    def _copied_run(self, rng: random.Random) -> tuple[Path, str]:
        path = self._new("run")
        shutil.copytree(self._run, path, symlinks=True)
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
        victim = rng.choice(files)
        content = victim.read_bytes()
        how = rng.randrange(6)
        if how == 0:
            victim.unlink()
        elif how == 1:
            victim.write_bytes(content[: rng.randrange(len(content) + 1)])
        elif how == 2:
            victim.write_bytes(b"\x00" * len(content))
        elif how == 3:
            victim.unlink()
            victim.mkdir()
        elif victim.suffix == ".json":
            victim.write_text(damaged_json(rng, content.decode()), encoding="utf-8", errors="surrogatepass")
        elif victim.suffix == ".jsonl":
            lines = [damaged_json(rng, line) for line in content.decode().splitlines()]
            victim.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
        elif victim.suffix == ".html":
            before, mark, after = content.decode().partition('id="summary">')
            summary, end, rest = after.partition("</script>")
            victim.write_text(
                before + mark + damaged_json(rng, summary) + end + rest, encoding="utf-8", errors="surrogatepass"
            )
        else:
            place = rng.randrange(len(content))
            victim.write_bytes(content[:place] + rng.randbytes(8) + content[place + 8 :])
        return path, f"{victim.relative_to(path)} ({how})"

    def report(self, rng: random.Random) -> Case:
        path, what = self._copied_run(rng)
        return Case(["report", str(path), *(["--json"] if rng.random() < 0.3 else [])], f"report {what}")

    def resumed(self, rng: random.Random) -> Case:
        path, what = self._copied_run(rng)
        target = self._new("root") / "co2/m"
        target.parent.mkdir(parents=True)
        path.rename(target)
        words = ["--mark", "m", "--root-path", str(target.parents[1]), "--resume", "auto", "--steps", "3"]
        return Case(["train", *TINY, *words], f"resume {what}")

    def transformers(self, rng: random.Random) -> Case:
        config = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 8,
            "vocab_size": 256,
            "n_positions": 32,
        }
        path = self._new("config.json")
        path.write_text(damaged_json(rng, json.dumps(config)), encoding="utf-8", errors="surrogatepass")
        words = ["--sequence-length", "8", "--batch-size", "1"]
        return Case(["plan", "--model", f"transformers:{path}", *words], f"transformers {path.read_bytes()[:150]!r}")

    def cost_cache(self, rng: random.Random) -> Case:
        folder = self._new("cache")
        environment = {"TIGHTFIT_COST_CACHE": "on", "TIGHTFIT_CACHE_DIR": str(folder)}
        call(["plan", *TINY], environment)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files, "no cost was kept"
        for file in files:
            head, costs = file.read_text(encoding="utf-8").splitlines()
            costs = damaged_json(rng, costs)
            checksum = hashlib.sha256(costs.encode("utf-8", errors="surrogatepass")).hexdigest()
            head = json.dumps({**json.loads(head), "checksum": checksum})  # whoever poisons it can count, too
            file.write_text(f"{head}\n{costs}\n", encoding="utf-8", errors="surrogatepass")
        return Case(["plan", *TINY], f"cost cache {folder}", environment)


def call(words: list[str], environment: dict[str, str] | None = None) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    begin = time.process_time()
    code: int | None = None
    changed = patch.dict(os.environ, environment or {})
    with changed, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = tightfit_main(words)
        except BaseException as problem:  # what would end the process with a traceback
            err.write(f"Traceback: {type(problem).__name__}: {problem}"[:2000])
    return Outcome(
        Case(words, ""), code, err.getvalue() + (out.getvalue() if code == 0 else ""), time.process_time() - begin
    )


def run(count: int, seed: int, first: int = 0) -> list[Outcome]:
    """Try so many cases, from that number on; return those with a problem."""
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            generator = Generator(Path(folder))
            failed = []
            for number in range(first, first + count):
                case = generator.draw(random.Random(f"{seed}:{number}"))
                outcome = call(case.words, case.environment)
                outcome.case.what = f"{seed}:{number} {case.what}"
                if outcome.problem:
                    failed.append(outcome)
                    print(f"{outcome.case.what}: {outcome.problem}\n{outcome.said[-1500:]}", file=sys.stderr)
            return failed
        finally:
            os.chdir(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--first", type=int, default=0, help="the number of the first case: each is the same for a seed"
    )
    given = parser.parse_args()
    os.environ.setdefault("TIGHTFIT_COST_CACHE", "off")
    failed = run(given.count, given.seed, given.first)
    print(f"{given.count} malformed calls: {len(failed)} with a traceback, a wrong exit code or no word")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
