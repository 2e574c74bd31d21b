"""Take one optimizer step for a batch however it is split: "auto batch size changes the training".

See https://github.com/huggingface/transformers/issues/33281.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.runs import metrics
from tightfit.cli.main import main

TOKENS = ["--model", "tests.train.user_code:token_mean_model", "--dataset", "tests.train.user_code:ragged_numbers"]
IMAGES = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:numbers"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "data"), [(TOKENS, "tests.train.user_code-ragged_numbers"), (IMAGES, "tests.train.user_code-numbers")]
)
def test_losses_and_weights_are_those_of_the_whole_batch(words: list[str], data: str) -> None:
    """With microbatches of unequal numbers of tokens, too: their losses are weighted by what they are means over."""
    common = ["--batch-size", "8", "--epochs", "1", "--log-every", "1", "--optimizer", "sgd"]
    assert main(["train", *words, *common, "--mark", "whole"]) == 0
    for size in ("1", "3", "5"):
        assert main(["train", *words, *common, "--mark", size, "--microbatch-size", size]) == 0
        whole, parts = (metrics(f"{data}/{mark}") for mark in ("whole", size))
        assert [line["step"] for line in whole] == [line["step"] for line in parts]
        assert [line["loss"] for line in whole] == pytest.approx([line["loss"] for line in parts], rel=1e-5)
        a, b = (load_file(f"runs/{data}/{mark}/model.safetensors") for mark in ("whole", size))
        assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)
