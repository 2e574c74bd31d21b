"""A resumed run is the uninterrupted one to the bit, whatever is drawn at random before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.runs import weights
from tightfit.cli.main import main
from tightfit.train.config import TrainConfig
from tightfit.train.largest_batch import largest_microbatch
from tightfit.train.random_state import random_state
from tightfit.train.workload import build, resolve

MODEL, DATASET = "tests.train.user_code:draws_everywhere", "tests.train.user_code:noisy_ragged_numbers"
RUN = "tests.train.user_code-noisy_ragged_numbers"


@pytest.mark.parametrize("more", [["--grad-checkpoint", "full"], ["--microbatch-size", "3"]])
def test_with_augmentation_dropout_and_random_operations(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--model", MODEL, "--dataset", DATASET, "--batch-size", "6", *more]
    assert main([*words, "--steps", "5", "--mark", "whole"]) == 0
    assert main([*words, "--steps", "2", "--mark", "parts"]) == 0
    assert main([*words, "--steps", "5", "--mark", "parts", "--resume", "auto"]) == 0
    whole, parts = weights(f"{RUN}/whole"), weights(f"{RUN}/parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_looking_for_the_largest_batch_draws_nothing() -> None:
    config = TrainConfig(model=MODEL, dataset=DATASET, batch_size=4)
    work = build(*resolve(config))
    before = random_state()
    largest_microbatch(work.data, work.loader, 0, 5)
    after = random_state()
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
