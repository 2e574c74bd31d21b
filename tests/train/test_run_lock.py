"""Two runs at once in one folder would mix their metrics and delete each other's files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tightfit.cli.main import main
from tightfit.errors import UnsupportedInput
from tightfit.train import run_lock
from tightfit.train.run_lock import LOCK, only_run_in

HOLD = """
import sys
from pathlib import Path
from tightfit.train.run_lock import only_run_in
with only_run_in(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of the folder `run`, until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_who_the_first_is(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_WAIT_S", 0.2)
    said: list[str] = []
    refused = pytest.raises(UnsupportedInput, match=rf"process {holder.pid} on .* is training in .*--mark NAME")
    with refused, only_run_in(tmp_path / "run", said.append):
        pytest.fail("both have it")
    assert len(said) == 1
    assert said[0].startswith(f"waiting for process {holder.pid}")


def test_a_run_that_was_killed_leaves_no_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with only_run_in(tmp_path / "run", pytest.fail):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_one_that_ends_soon_is_waited_for(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    def end(_: str) -> None:
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()

    with only_run_in(tmp_path / "run", end):
        assert (tmp_path / "run" / LOCK).exists()


def test_what_was_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    with only_run_in(tmp_path / "a/b", pytest.fail):
        pass
    assert list(tmp_path.iterdir()) == []
    with only_run_in(tmp_path / "a/b", pytest.fail):
        (tmp_path / "a/b/file").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["file"]


def test_a_lock_that_cannot_be_removed_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lost the right to write into its folder ended with exit code 2 and a word about its lock."""

    def denied(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # noqa: PT012  # the lock is given back in it
        patch.setattr(Path, "unlink", denied)
        with only_run_in(tmp_path / "run", pytest.fail):
            raise ZeroDivisionError
    with only_run_in(tmp_path / "run", pytest.fail):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes")
@pytest.mark.parametrize("kind", ["link", "link to nothing", "another name of it", "pipe", "folder"])
def test_nothing_is_written_through_a_lock_that_somebody_made_up(kind: str, tmp_path: Path) -> None:
    """It was emptied and written to; one that led to nothing was tried for ever."""
    ours, lock = tmp_path / "ours", tmp_path / "run" / LOCK
    ours.write_text("ours")
    lock.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    elif kind == "another name of it":
        lock.hardlink_to(ours)
    else:
        lock.symlink_to(ours if kind == "link" else "nowhere/at/all")
    refused = pytest.raises(UnsupportedInput, match=r"is not the file that a run makes there.* Remove it\.")
    with refused, only_run_in(lock.parent, pytest.fail):
        pytest.fail("it has it")
    assert ours.read_text() == "ours"
    assert os.path.lexists(lock)


@pytest.mark.usefixtures("own_folder")
def test_a_folder_in_use_is_refused_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "_WAIT_S", 0.0)
    folder = Path("runs/co2/m")
    holding = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holding.stdout is not None
        assert holding.stdout.readline() == "held\n"
        assert main(["train", "--model", "lstm-tiny", "--steps", "1", "--mark", "m", "--resume", "auto"]) == 2
        assert "is training in runs/co2/m, and two runs in one folder" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [LOCK]
    finally:
        holding.kill()
        holding.communicate()
