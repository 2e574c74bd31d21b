"""Plan the data's largest batch before the first step, and name it if it cannot fit: else "OOM after hours".

See https://github.com/meta-pytorch/torchtune/issues/2830.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import metrics
from tightfit.cli.main import main

WORDS = [
    "--model", "tests.train.user_code:token_mean_model", "--dataset", "tests.train.user_code:ragged_numbers",
    "--batch-size", "4", "--epochs", "2", "--log-every", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_is_named_with_its_step_samples_shape_and_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *WORDS, "--memory", "120KiB", "--grad-checkpoint", "off"]) == 2
    said = capsys.readouterr().err
    for part in ("the largest of the run", "batch of step", "float32[4x400]", " 37", "bytes), set by", "Traceback"):
        assert (part in said) == (part != "Traceback"), part
    assert not Path("runs").exists()


def test_one_long_sample_at_the_end_of_an_epoch_does_not_go_over_the_budget() -> None:
    assert main(["train", *WORDS, "--memory", "400KiB", "--mark", "m"]) == 0
    lines = metrics("tests.train.user_code-ragged_numbers/m")
    assert len(lines) == 20
    peaks = [line["peak_bytes"] for line in lines]
    assert max(peaks) <= 400 * 1024
    assert max(peaks) > 5 * sorted(peaks)[10]  # the long one was among them
