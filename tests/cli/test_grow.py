"""The largest batch, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.train.runs import metrics
from tightfit.cli.main import main

TINY = ("grow", "--model", "gpt-tiny", "--device", "t4-16gb", "--memory", "700MiB", "--most", "3")


def test_the_most_that_was_tried_is_said_to_be_no_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY]) == 0
    text = capsys.readouterr().out
    assert "largest 3 samples within 700.0 MiB" in text
    assert "more may fit" in text


def test_a_missing_sample_count_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY[:-1], "0"]) == 2
    assert "--most" in capsys.readouterr().err


LARGEST = (
    "train", "--model", "tests.train.user_code:token_mean_model", "--dataset", "tests.train.user_code:ragged_numbers",
    "--batch-size", "max", "--memory", "200KiB", "--mark", "m", "--optimizer", "sgd", "--log-every", "1",
)  # fmt: skip


def test_a_training_takes_the_largest_batch_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*LARGEST, "--steps", "1"]) == 0
    kept = yaml.safe_load(Path("runs/tests.train.user_code-ragged_numbers/m/config.yaml").read_text())["batch_size"]
    assert kept > 1
    assert f"--batch-size max is {kept} here" in capsys.readouterr().out
    assert metrics("tests.train.user_code-ragged_numbers/m")[0]["peak_bytes"] <= 200 << 10
    assert main([*LARGEST, "--steps", "2", "--resume", "auto", "--memory", "400KiB"]) == 0  # with the batches it had
    assert f"--batch-size max is {kept} here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "--model", "gpt-tiny", "--batch-size", "max", "--microbatch-size", "2"], "--microbatch-size"),
        (["plan", "--model", "gpt-tiny", "--batch-size", "max"], "tightfit grow"),
    ],
)
def test_the_largest_batch_is_refused_where_nothing_is_to_be_found(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
