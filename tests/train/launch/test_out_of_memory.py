"""End the whole job when one rank runs out of memory, and say which rank and which batch; else the others hang.

See https://github.com/pytorch/pytorch/issues/163546.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.train.launch.launching import TWO, finish, logged, start


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_rank_1_runs_out_of_memory() -> None:
    process = start("train", "--model", "tests.train.user_code:runs_out", "--dataset", "tests.train.user_code:numbers",
                    "--batch-size", "8", "--steps", "1000000", "--log-every", "20", *TWO)  # fmt: skip
    logged(process, "tests.train.user_code-numbers/tests.train.user_code-runs_out", 2)
    Path("run-out").touch()
    ended = finish(process)
    assert ended.code == 1, ended.err
    assert "tightfit: rank 1: a step on" in ended.err
    assert "float32[4x4]" in ended.err
    assert "ran out of memory" in ended.err
    assert re.search(r"It was step \d+, of samples \d+", ended.err)
    (noted,) = Path("runs").rglob("memory-limit.json")  # by rank 1; the same command goes on with it
    assert "float32[4x4]" in noted.read_text()
    assert ended.err.rstrip().splitlines()[-1].startswith("tightfit: rank 1 (process ")


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_rank_1_runs_out_of_memory_in_a_trial_step_of_a_sharded_model() -> None:
    """FSDP2 cannot leave a backward: no other plan can be tried, and the other rank waits for the gradients."""
    model, data = "tests.train.user_code:exhausts", "tests.train.user_code:numbers"
    process = start("train", "--model", model, "--dataset", data, "--strategy", "fsdp", "--memory", "100MiB",
                    "--batch-size", "8", "--steps", "2", *TWO)  # fmt: skip
    ended = finish(process)
    assert ended.code == 1, ended.err
    message = re.search(r"tightfit: rank 1: a trial step of the sharded model ran out of memory.*", ended.err)
    assert message is not None, ended.err
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in message[0]
    assert "within the budget of 100.0 MiB" in message[0]
    assert "a budget of 95.0 MiB (99614720 bytes)" in message[0]
    assert "Traceback" not in ended.err
    assert "mixed torch.Tensor and DTensor" not in ended.err
    assert ended.err.rstrip().splitlines()[-1].startswith("tightfit: rank 1 (process ")
