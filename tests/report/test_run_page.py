"""`tightfit report`: the page of a run, finished or not; written at a run's end, and made again from its files."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tightfit.cli.main import main
from tightfit.records import Plan, Profile
from tightfit.report.region_rows import region_rows
from tightfit.report.run_files import read_run
from tightfit.report.run_verdict import verdict_of
from tightfit.units import format_bytes

WORDS = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--steps", "4", "--log-every", "1", "--eval-every", "2"]


class Text(HTMLParser):
    """All text of a page; fails on what the page would have to fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.lines = self.layers = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "img")
        assert tag != "script" or dict(attrs)["type"] == "application/json"
        assert not {"src", "href"} & {name for name, _ in attrs}
        self.lines += tag == "polyline"
        self.layers += tag == "polygon"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    assert main([*WORDS, "--mark", "a<b>", "--root-path", str(root / "runs"), "--quiet"]) == 0
    return root / "runs"


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a finished run, which a test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    (folder,) = (tmp_path / "runs" / "co2").iterdir()
    return folder


def test_a_finished_run_has_its_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    shown = Text(page)
    assert main(["report", str(run), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["steps"] == 4
    assert "finished" in shown.text
    assert "equal" in shown.words  # gradients
    assert f"{summary['best']:.4g}" in shown.words
    assert "model: lstm-tiny" in shown.text
    assert shown.lines >= 6  # two losses, errors, throughput, peaks, the frontier
    assert shown.layers >= 4  # parameters, gradients, optimizer state, activations
    assert re.search(r"Kept its budget of .*: peak .*; gradients bit for bit those of the plain step", shown.text)
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (run / "report.html").read_text(encoding="utf-8") == page  # from files alone


def test_a_proof_of_a_part_of_the_gradients_is_told_as_one(run: Path) -> None:
    found = read_run(run)
    assert found.summary is not None
    assert verdict_of(found).state == "good"
    part = verdict_of(replace(found, summary={**found.summary, "compared_share": 0.7}))
    assert part.state == "open"
    assert part.sentence.endswith("bit for bit those of the plain step (70% of them compared).")
    assert part.compared.startswith("70% of them ")


def test_regions_are_listed_with_what_they_keep_and_why(run: Path) -> None:
    plan, profile = Plan.load(run / "plan.json"), Profile.load(run / "profile.json")
    rows = region_rows(plan, profile)
    assert sum(row.calls for row in rows) == len(plan.regions)
    assert sum(row.kept_bytes or 0 for row in rows) == profile.saved_bytes()  # the plain step: nothing is dropped
    shown = Text((run / "report.html").read_text(encoding="utf-8"))
    assert {row.reason for row in rows} <= set(shown.words)
    assert {format_bytes(row.kept_bytes) for row in rows if row.kept_bytes} <= set(shown.words)


def test_plots_are_files_of_their_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--plots", "plots", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["plots"]
    assert sorted(files) == sorted(str(path) for path in Path("plots").iterdir())
    assert {"memory-plain.png", "frontier.svg", "loss.png", "throughput.svg"} <= {Path(name).name for name in files}
    assert all(Path(name).read_bytes()[:4] == b"\x89PNG" for name in files if name.endswith(".png"))


def test_a_folder_without_a_profile_still_has_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As versions wrote it that kept none; and one that is of another step is refused."""
    (run / "profile.json").rename("profile.json")
    assert main(["report", str(run)]) == 0
    assert Text((run / "report.html").read_text(encoding="utf-8")).layers == 0
    text = Path("profile.json").read_text(encoding="utf-8").replace("<loss>#0", "<loss>#9")
    (run / "profile.json").write_text(text, encoding="utf-8")
    assert main(["report", str(run)]) == 2
    assert "is of another step" in capsys.readouterr().err


def test_a_run_that_was_stopped_and_one_that_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')  # being written
    assert main(["report", str(run), "--output", "other.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "other.html", "finished": False, "summary": None}
    shown = Text(Path("other.html").read_text(encoding="utf-8"))
    assert "4 steps, not finished" in shown.text
    assert main([*WORDS, "--mark", "a<b>", "--steps", "5", "--resume", "auto"]) == 0
    capsys.readouterr()
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["steps"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run folder is given"),
        (["nowhere"], "nowhere holds no run"),
        (["one", "two"], "'one', which is not a setting"),
        (["--run-folder", "RUN", "--output", "no/such/folder/x.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_reported_on(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *(str(run) if word == "RUN" else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["plan.json", "profile.json", "environment.json"])
def test_a_damaged_file_is_named_as_such(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    (run / name).write_text("{no json\n")
    assert main(["report", str(run)]) == 2
    assert "damaged" in capsys.readouterr().err
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["config.yaml", "command.txt", "environment.json", "metrics.jsonl", "report.html", "log.txt"]
)
def test_no_file_of_ours_gets_into_a_page_or_is_written_to_through_a_link(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder may come from somebody else, who would like to have a key of ours in a page that we send back."""
    ours = tmp_path / "ours"
    ours.write_text((run / name).read_text(encoding="utf-8") + "secret", encoding="utf-8")
    before = ours.read_bytes()
    (run / name).unlink()
    (run / name).symlink_to(ours)
    assert main(["report", str(run), "--output", "page.html"]) == 2
    assert main([*WORDS, "--mark", "a<b>", "--steps", "5", "--resume", "auto"]) == 2
    assert capsys.readouterr().err.count("leads out of the run's folder") == 2
    assert not Path("page.html").exists()
    assert ours.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes")
@pytest.mark.parametrize("name", ["plan.json", "command.txt", "log.txt", "metrics.jsonl"])
def test_a_pipe_is_not_waited_for(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    assert main(["report", str(run)]) == 2
    assert main([*WORDS, "--mark", "a<b>", "--steps", "5", "--resume", "auto"]) == 2
    assert capsys.readouterr().err.count(f"{name} is no file") == 2


def test_what_no_run_makes_so_large_is_not_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.truncate(2**42)  # of which the disk holds nothing
    assert main(["report", str(run)]) == 2
    assert "no run makes it that large" in capsys.readouterr().err
