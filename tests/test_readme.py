"""README.md, CHANGELOG.md and the pages of docs/ hold what they say.

Links resolve, commands are accepted by the parser, Python blocks run, and what is named in the repository exists.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tightfit.cli.main import COMMANDS, main
from tightfit.report.peers import load_peers

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "examples/README.md", *DOCS]

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
#: Programs after which `tightfit` and its arguments may stand in a line.
_LAUNCHERS = ("tightfit", "torchrun", "srun", "python")


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks of one language; "" for those that name none."""
    return [body for name, body in _FENCED.findall(page.read_text(encoding="utf-8")) if name == language]


def inline_code(page: Path) -> list[str]:
    """What stands between backticks in a page's prose."""
    prose = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def shell_lines(page: Path) -> Iterator[str]:
    """The lines of blocks without a language, continued lines joined, prompts taken off."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.removeprefix("$ ")


def commands(page: Path) -> list[list[str]]:
    """The arguments of each call of `tightfit` that a page shows."""
    lines = [line for line in shell_lines(page) if line.split(" ")[0] in _LAUNCHERS]
    lines += [code for code in inline_code(page) if code.startswith("tightfit ")]
    found = [shlex.split(line, comments=True) for line in lines]
    for block in blocks(page, "yaml"):
        for document in yaml.safe_load_all(block):
            if document["kind"] == "Job":
                found += [box["command"] for box in document["spec"]["template"]["spec"]["containers"]]
    return [words[words.index("tightfit") + 1 :] for words in found if "tightfit" in words]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Let commands be parsed and checked, and do nothing; the names of those that were."""
    names: list[str] = []
    for name, (command, _) in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, (command, lambda options, words, name=name: names.append(name) or 0))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for file in ("run.yaml", "config.yaml"):
        (tmp_path / file).write_text("steps: 100\n", encoding="utf-8")
    return names


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


#: Characters of a line of code that the site's column shows without scrolling, on a screen of 1200 pixels.
_COLUMN = 94


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_code_fits_the_column_of_the_site(page: Path) -> None:
    for _, body in _FENCED.findall(page.read_text(encoding="utf-8")):
        assert [line for line in body.splitlines() if len(line) > _COLUMN] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_tables_are_whole(page: Path) -> None:
    """A row after an empty line begins a table, which a line of dashes says."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for first, second in re.findall(r"\n\n(\|.*)\n(.*)", text):
        assert re.fullmatch(r"\|[-:| ]+\|", second), first


def test_the_contents_name_every_page() -> None:
    linked = set(_LINK.findall((ROOT / "docs/index.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS} - {"index.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page: Path, parsed_only: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        assert main(words) == 0, f"tightfit {shlex.join(words)}: {capsys.readouterr().err}"


def test_commands_are_found(parsed_only: list[str]) -> None:
    """What the test above checks is not nothing."""
    shown = commands(ROOT / "docs/command-line.md")
    assert {words[0] for words in shown} == set(COMMANDS)
    assert [words[:3] for words in commands(ROOT / "docs/distributed.md")].count(["train", "--model", "gpt"]) >= 9


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Targets of make, benchmarks, and files of the repository."""
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for code in [*inline_code(page), *shell_lines(page)]:
        match shlex.split(code.replace("'", ""), comments=True):
            case ["make", target, *_] if target.islower():
                assert target in targets, code
            case ["python", "-m", module, *_]:
                file = ROOT / module.replace(".", "/")
                assert module == "tightfit" or file.is_dir() or file.with_suffix(".py").is_file(), code
            case ["python", file, *_]:
                assert (ROOT / file).is_file(), code
        if re.fullmatch(r"(benchmarks|tests|docs|examples|tightfit|\.github|\.ci)/[\w./-]+", code):
            assert (ROOT / code).exists(), code


#: Where a page quotes what the program prints: the page, and a pattern of the quotations in it.
QUOTATIONS = [
    (README, r"^  (?:plain step|this run|budget|slowdown|gradients|buffers|loss)  .*$"),
    (ROOT / "docs/budgets.md", r"^(?: +budget  of|  566|  measured|.*  smallest|.*  your budget).*$"),
    (ROOT / "docs/distributed.md", r"^\| `[^-].*?` \|"),
]


@pytest.mark.parametrize(("page", "pattern"), QUOTATIONS, ids=[name_of(page) for page, _ in QUOTATIONS])
def test_what_is_quoted_is_what_the_program_says(page: Path, pattern: str) -> None:
    """Its words in a row are words in a row of some string in the package, figures and names left out."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tightfit").rglob("*.py"))
    said = re.sub(r"\W*[\"']\s*f?[\"']\W*", " ", text)  # strings that stand next to each other are one
    words_said = " ".join(re.findall(r"[a-z]+", said))
    quotations = re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quotations) >= 5
    for quotation in quotations:
        for run in re.findall(r"[a-z]+(?: [a-z]+)+", quotation):
            assert run in words_said, quotation


def test_the_python_of_the_readme_trains() -> None:
    (block,) = blocks(README, "python")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    before = model[0].weight.detach().clone()
    batches = [torch.randn(16, 8) for _ in range(3)]
    names = {
        "model": model,
        "batch": batches[0],
        "batches": batches,
        "loss_fn": lambda m, b: m(b).pow(2).mean(),
        "optimizer": torch.optim.AdamW(model.parameters()),
    }
    exec(compile(block, "README.md", "exec"), names)
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page, "python")], ids=name_of)
@pytest.mark.slow
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks one after the other, as the page says; what they assert holds."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_the_file_of_peers_is_one(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs/budgets.md", "json")
    (tmp_path / "peers.json").write_text(block, encoding="utf-8")
    assert load_peers(tmp_path / "peers.json").points


def test_ci_runs_the_supported_versions() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [entry.rpartition(" ")[2] for entry in project["classifiers"] if "Python :: 3." in entry]
    assert matrix["python"] == pythons
    (lowest,) = [entry.partition(">=")[2] for entry in project["dependencies"] if entry.startswith("torch>=")]
    assert matrix["torch"][0] == f"{lowest}.0"
    (pinned,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints-dev.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned in matrix["torch"]


TRAINING_RUNS = [line for line in shell_lines(ROOT / "docs/training.md") if line.startswith("tightfit train ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(0, marks=pytest.mark.exhaustive), pytest.param(1, marks=pytest.mark.exhaustive), 2]
)
def test_the_training_runs_begin(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their first two steps, within their budgets; what they reach takes too long for a test."""
    monkeypatch.chdir(ROOT)
    assert len(TRAINING_RUNS) == 3
    _, *words = shlex.split(re.sub(r"--epochs \d+", "--steps 2", TRAINING_RUNS[number]))
    assert main([*words, "--eval-samples", "8", "--root-path", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured_peak_bytes"] <= found["budget_bytes"] < 0.6 * found["plain_peak_bytes"]
    assert found["gradients_equal"] is True
