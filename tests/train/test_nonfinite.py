"""Losses, gradients and weights that are no numbers: noticed before they are saved; or their steps are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.runs import metrics, weights
from tightfit.cli.main import main
from tightfit.train.checkpoint import read_training_state
from tightfit.train.finiteness import is_finite

MODEL = ["--model", "tests.train.user_code:own_loss_model"]
BAD = [*MODEL, "--dataset", "tests.train.user_code:numbers_with_nan", "--batch-size", "4"]
BAD_RUN = "tests.train.user_code-numbers_with_nan"
QUIET = ["--log-every", "1000"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(run: str) -> dict[str, Any]:
    """The tensors of each checkpoint of a run."""
    found = sorted(Path("runs", run, "checkpoints").glob("step-*"))
    return {path.name: read_training_state(path) for path in found}


def all_finite(thing: Any) -> bool:
    if isinstance(thing, torch.Tensor):
        return bool(thing.isfinite().all())
    return all(map(all_finite, thing.values())) if isinstance(thing, dict) else True


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_a_step_that_is_not_logged_is_noticed_before_it_is_saved(
    optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*BAD, *QUIET, "--steps", "16", "--save-every", "1", "--optimizer", optimizer, "--mark", "m"]
    assert main(["train", *words]) == 1
    said = capsys.readouterr().err
    for beat in ("not finite", "they are not saved", "is from before", "Try a smaller --lr", "--on-nonfinite skip"):
        assert beat in said
    kept = saved(f"{BAD_RUN}/m")
    assert 0 < len(kept) < 16
    assert all(all_finite([state["model"], state["optimizer"]["state"]]) for state in kept.values())
    assert Path(f"runs/{BAD_RUN}/m/checkpoints/latest").resolve().name == max(kept)
    assert not Path(f"runs/{BAD_RUN}/m/model.safetensors").exists()


def test_weights_that_the_last_step_makes_infinite_are_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss is finite: it was computed before."""
    words = [*MODEL, "--dataset", "tests.train.user_code:numbers", "--optimizer", "sgd", "--lr", "3e38", "--steps", "1"]
    assert main(["train", *words, "--mark", "m"]) == 1
    assert "the weights are not finite" in capsys.readouterr().err
    assert saved("tests.train.user_code-numbers/m") == {}


def test_a_step_without_finite_gradients_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*BAD, *QUIET, "--steps", "16", "--on-nonfinite", "skip", "--json", "--mark", "m"]
    assert main(["train", *words]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out, parse_constant=pytest.fail)
    assert document["skipped_steps"] == 1
    assert "1 of 16 steps, whose loss or gradients were not finite" in captured.err
    assert "is skipped: its loss or gradients are not finite" in Path(f"runs/{BAD_RUN}/m/log.txt").read_text()
    assert all_finite(weights(f"{BAD_RUN}/m"))


def test_a_run_of_skipped_steps_only_has_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    """They change no weight, and are logged as JSON."""
    words = [*BAD, "--batch-size", "64", "--steps", "3", "--on-nonfinite", "skip", "--log-every", "1", "--mark", "m"]
    assert main(["train", *words, "--save-every", "1"]) == 1  # the bad sample is in every batch
    said = capsys.readouterr().err
    for beat in ("all 3 steps were skipped", "not saved as its model", "--on-nonfinite stop"):
        assert beat in said
    first, second = (state["model"] for state in saved(f"{BAD_RUN}/m").values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not Path(f"runs/{BAD_RUN}/m/model.safetensors").exists()
    assert [line["loss"] for line in metrics(f"{BAD_RUN}/m")] == [None] * 3
    text = Path(f"runs/{BAD_RUN}/m/metrics.jsonl").read_text()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert main(["report", f"runs/{BAD_RUN}/m"]) == 0


def test_infinity_that_a_model_holds_on_purpose_is_no_fault() -> None:
    words = ["--model", "tests.train.user_code:masked_model", "--dataset", "tests.train.user_code:numbers"]
    assert main(["train", *words, "--steps", "2", "--mark", "m"]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_one_bad_element_of_any_dtype_and_layout_is_found(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    assert is_finite(tensor)
    tensor[1, 3] = bad
    assert not is_finite(tensor)
    assert not is_finite(tensor.t()[2:])
    assert not is_finite(tensor.to_sparse())


def test_what_holds_no_numbers_is_finite() -> None:
    assert is_finite(torch.empty(0))
    assert is_finite(torch.arange(3))
    assert is_finite(torch.ones(2, dtype=torch.bool))
