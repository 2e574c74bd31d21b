"""A run goes on when nothing takes its output any more, and its log has all of it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tightfit.cli.main import main
from tightfit.report.lasting_stream import LastingStream
from tightfit.report.reporter import Reporter


def test_whose_reader_has_ended_is_said_in_the_log_alone(tmp_path: Path) -> None:
    """rich ended the process then, with exit code 1 and no word."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, Reporter(stream) as reporter:
        reporter.open_log(tmp_path / "log.txt")
        for number in range(3):
            reporter.say(f"line {number}")
        stream.write("more")  # as the interpreter may at its end
    logged = (tmp_path / "log.txt").read_text()
    assert [f"line {number}\n" in logged for number in range(3)] == [True] * 3
    assert logged.count("what is printed is lost from here on (Broken pipe)") == 1


def test_what_a_terminal_has_no_letters_for_is_written_all_the_same() -> None:
    taken = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(taken, encoding="ascii"), pytest.fail)
    stream.write("größe →\n")
    stream.flush()
    assert taken.getvalue() == b"gr\\xf6\\xdfe \\u2192\n"


def test_no_stream_and_a_closed_one() -> None:
    Reporter(LastingStream(None, pytest.fail)).say("x")  # type: ignore[arg-type]  # as good as one
    told: list[str] = []
    closed = io.StringIO()
    closed.close()
    stream = LastingStream(closed, told.append)
    stream.write("x")
    stream.write("y")
    assert len(told) == 1
    assert not stream.isatty()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.usefixtures("own_folder")
def test_a_run_whose_output_has_no_room_ends_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(["train", "--model", "lstm-tiny", "--steps", "2", "--mark", "m"]) == 0
    assert Path("runs/co2/m/model.safetensors").exists()
    assert "lost from here on (No space left on device)" in Path("runs/co2/m/log.txt").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_list_that_is_not_written_is_no_success() -> None:
    """It ended with Python's own words, and exit code 120."""
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "tightfit", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 1
    assert "nothing more could be written (No space left on device). Make room there" in ended.stderr
    assert "Exception ignored" not in ended.stderr
