"""End the whole job when one rank runs out of memory, and say which rank and which batch; else the others hang.

See https://github.com/pytorch/pytorch/issues/163546.
"""

from __future__ import annotations

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
    assert ended.err.rstrip().splitlines()[-1].startswith("tightfit: rank 1 (process ")
