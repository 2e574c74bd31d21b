"""Train a block called twice, one never called and one that is frozen in two processes like in one, with and without
recomputation: "Expected to mark a variable ready only once".

See https://github.com/huggingface/accelerate/issues/389 and https://github.com/huggingface/accelerate/issues/2017.

Two of the jobs run side by side, each on a port of its own ("EADDRINUSE 29500",
https://github.com/pytorch/pytorch/issues/85604).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.launch.launching import TWO, alone, equal_bits, finish, run, start

WORDS = ["train", "--model", "tests.train.user_code:odd_model", "--dataset", "tests.train.user_code:numbers",
         "--batch-size", "8", "--steps", "4", "--optimizer", "sgd", "--lr", "0.1"]  # fmt: skip


def weights(mark: str) -> dict[str, torch.Tensor]:
    return load_file(Path("runs/tests.train.user_code-numbers") / mark / "model.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_called_twice_unused_and_frozen() -> None:
    alone(*WORDS, "--mark", "one")
    jobs = [start(*WORDS, *TWO, "--mark", "two"), start(*WORDS, *TWO, "--mark", "planned", "--grad-checkpoint", "full")]
    assert [ended.code for ended in map(finish, jobs)] == [0, 0]
    run(*WORDS, *TWO, "--mark", "parts", "--grad-checkpoint", "full", "--microbatch-size", "2")
    assert equal_bits(weights("planned"), weights("two"))
    torch.testing.assert_close(weights("two"), weights("one"), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights("parts"), weights("one"), rtol=1e-5, atol=1e-7)
