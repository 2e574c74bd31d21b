"""`tightfit report`: the page of a run, finished or not; written at a run's end, and made again from its files."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tightfit.cli.main import main

WORDS = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--steps", "4", "--log-every", "1", "--eval-every", "2"]


class Text(HTMLParser):
    """All text of a page; fails on what the page would have to fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.lines = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "img")
        assert tag != "script" or dict(attrs)["type"] == "application/json"
        assert not {"src", "href"} & {name for name, _ in attrs}
        self.lines += tag == "polyline"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "--mark", "a<b>"]) == 0
    capsys.readouterr()
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
    assert shown.lines >= 5  # two losses, memory, times, rates
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (run / "report.html").read_text(encoding="utf-8") == page  # from files alone


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


@pytest.mark.parametrize("name", ["plan.json", "environment.json"])
def test_a_damaged_file_is_named_as_such(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    (run / name).write_text("{no json\n")
    assert main(["report", str(run)]) == 2
    assert "damaged" in capsys.readouterr().err
    assert (run / "report.html").read_bytes() == before
