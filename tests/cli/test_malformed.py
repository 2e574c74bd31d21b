"""Malformed command lines and files, drawn by chance; `python -m tests.cli.fuzz_bad_input` tries as many as one likes.

Under attack, 25 of 321 ended in a traceback, and 21 of 51 folders of runs that somebody had damaged.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.fuzz_bad_input import run
from tests.cli.test_bad_input import refused
from tightfit.cli.main import main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_traceback_and_an_exit_code_of_the_contract() -> None:
    assert [outcome.case.what for outcome in run(count=25, seed=7)] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: " * 500 + "1" + "}" * 500, "is not YAML: maximum recursion depth"),
        ("steps: " + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
        ), "holds more than 10,000 values, written out. Leave its aliases out"),
        ("a: &a [*a]", "holds more than 10,000 values"),
        ("#" * 2_000_000, "has more than 1,000,000 bytes"),
    ],
    ids=["deep", "digits", "bomb", "itself", "large"],
)  # fmt: skip
@pytest.mark.usefixtures("own_folder")
def test_a_configuration_that_would_keep_the_machine_busy(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(text)
    assert message in refused(["train", "--config-file", "run.yaml"], Path(), capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "a" * 300], "a...' cannot be used: File name too long"),
        (["--mark", "\ud800"], "is no character"),
        (["--root-path", "/dev/null/x"], "/dev/null is a file"),
    ],
    ids=["long", "surrogate", "below a file"],
)
@pytest.mark.usefixtures("own_folder")
def test_paths_that_none_can_be(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["train", "--model", "lstm-tiny", "--steps", "1", *words], Path(), capsys)


@pytest.mark.usefixtures("own_folder")
def test_a_folder_where_a_file_of_the_run_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--mark", "m", "--resume", "auto"]
    assert main([*words, "--steps", "1"]) == 0
    Path("runs/co2/m/log.txt").unlink()
    Path("runs/co2/m/log.txt").mkdir()
    capsys.readouterr()
    assert main([*words, "--steps", "2"]) == 2
    assert "log.txt is no file, so the run that it belongs to cannot be read" in capsys.readouterr().err
