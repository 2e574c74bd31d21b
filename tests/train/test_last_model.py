"""A run that has ended: its model is there, or the next same command writes it; nothing is trained on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.runs import weights
from tightfit.cli.main import main
from tightfit.train.loop import OptimizerStep
from tightfit.train.run_folder import RunFolder

WORDS = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:numbers"]
WORDS += ["--batch-size", "8", "--ema-decay", "0.9", "--resume", "auto"]
DATA = "tests.train.user_code-numbers"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(mark: str, *more: str) -> int:
    return main(["train", *WORDS, "--mark", mark, *more])


def end_before_the_model(mark: str, *more: str) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_model", killed)
        assert train(mark, *more) == 130


def same_weights(*marks: str) -> bool:
    one, other = (weights(f"{DATA}/{mark}") for mark in marks)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_ended_before_its_model_is_finished_by_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("whole", "--steps", "3") == 0
    end_before_the_model("cut", "--steps", "3")
    assert not Path(f"runs/{DATA}/cut/model.safetensors").exists()
    Path(f"runs/{DATA}/cut/.report.html.123.tmp").write_text("half")  # what a killed process leaves
    capsys.readouterr()
    assert train("cut", "--steps", "3") == 0
    assert "its model was not written when it ended" in capsys.readouterr().out
    assert not list(Path(f"runs/{DATA}/cut").glob(".*"))
    assert same_weights("whole", "cut")  # the average's, not the last step's
    assert "finished" in Path(f"runs/{DATA}/cut/report.html").read_text()
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert train("cut", "--steps", "3") == 0
    assert before == {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}


def test_the_model_of_an_earlier_end_is_not_taken_for_the_last_one() -> None:
    assert train("whole", "--steps", "4") == 0
    assert train("longer", "--steps", "2") == 0
    end_before_the_model("longer", "--steps", "4")
    assert not same_weights("whole", "longer")
    assert train("longer", "--steps", "4") == 0
    assert same_weights("whole", "longer")


def test_an_older_checkpoint_does_not_replace_the_model() -> None:
    assert train("m", "--steps", "4", "--save-every", "2") == 0
    before = Path(f"runs/{DATA}/m/model.safetensors").read_bytes()
    assert train("m", "--steps", "2", "--resume", f"runs/{DATA}/m/checkpoints/step-00000002") == 0
    assert Path(f"runs/{DATA}/m/model.safetensors").read_bytes() == before


def test_a_signal_in_the_last_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    take, taken = OptimizerStep.take, []

    def signalled(self: OptimizerStep, microbatches: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # handlers run between two bytecodes
        return take(self, microbatches)

    assert train("whole", "--steps", "3") == 0
    monkeypatch.setattr(OptimizerStep, "take", signalled)
    assert train("m", "--steps", "3") == 143
    assert "its model, which --resume auto writes" in capsys.readouterr().err
    assert train("m", "--steps", "3") == 0
    assert same_weights("whole", "m")


def test_after_an_early_stop_the_same_command_says_so_and_trains_no_further(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "lstm-tiny", "--batch-size", "8", "--steps", "50", "--eval-every", "2", "--early-stop", "2"]
    words += ["--lr", "1e-30", "--eval-samples", "8", "--resume", "auto", "--mark", "m"]
    assert main(["train", *words]) == 0
    run = Path("runs/co2/m")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", *words]) == 0
    said = capsys.readouterr().out
    assert "nothing to do: the run in runs/co2/m has ended: stopped early: loss has not improved in 2" in said
    assert "--early-stop 4 or without it" in said
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / "model.safetensors").unlink()  # as if the run had been killed there
    assert main(["train", *words]) == 0
    assert (run / "model.safetensors").read_bytes() == before[run / "model.safetensors"]
    stopped = json.loads((run / "checkpoints/latest/state.json").read_text())["step"]
    assert main(["train", *words, "--early-stop", "3"]) == 0
    assert json.loads((run / "checkpoints/latest/state.json").read_text())["step"] == stopped + 2


def test_a_full_disk_says_what_is_complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tightfit.train.run_folder.save_file", full)
        assert train("m", "--steps", "2") == 1
    assert "The checkpoint of step 2 is complete. Make room" in capsys.readouterr().err
    assert train("m", "--steps", "2") == 0
    assert weights(f"{DATA}/m")
