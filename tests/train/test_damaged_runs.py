"""Damage in a run's folder is named, costs no more than what was damaged, and nothing of it is deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.runs import metrics
from tightfit.cli.main import main

WORDS = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--log-every", "1", "--mark", "m", "--resume", "auto"]
RUN = Path("runs/co2/m")

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint after each, made once."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "--steps", "4", "--save-every", "1"]) == 0
    return folder / RUN


@pytest.fixture
def four_steps(trained: Path, own_folder: None) -> None:
    """That run, to be damaged."""
    shutil.copytree(trained, RUN, symlinks=True)


@pytest.mark.usefixtures("four_steps")
def test_a_damaged_checkpoint_is_named_and_set_aside(capsys: pytest.CaptureFixture[str]) -> None:
    whole = [line["loss"] for line in metrics("co2/m")]
    damaged = RUN / "checkpoints/step-00000004/training.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main([*WORDS, "--steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "the checkpoint step-00000004 is damaged: it is set aside as step-00000004.damaged, and not used" in said
    assert "resumed from step-00000003" in said
    assert (RUN / "checkpoints/step-00000004.damaged/training.safetensors").exists()
    assert [line["loss"] for line in metrics("co2/m")] == whole


@pytest.mark.usefixtures("four_steps")
@pytest.mark.parametrize("damage", [b"\x00" * 40, b"{}", b"[1, 2]", b'{"step": "x"}', b"[" * 50_000, b"\xff\xfe"])
def test_a_damaged_row_of_metrics_is_left_out(damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """NUL bytes are what a power loss leaves."""
    file = RUN / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    assert main([*WORDS, "--steps", "5"]) == 0
    assert "1 lines of metrics.jsonl are damaged and left out" in capsys.readouterr().out
    assert [line["step"] for line in metrics("co2/m")] == [1, 3, 4, 5]
    assert damage in (RUN / "metrics.jsonl.damaged").read_bytes()
    assert main(["report", str(RUN)]) == 0
