"""Hosts that train in two processes: every rank's training is the plain one."""

from __future__ import annotations

import json

import pytest

from tests.train.launch.launching import run, torchrun

pytest.importorskip("accelerate")
pytest.importorskip("lightning")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        ["trainer_ddp", "lightning_ddp", "trainer_fsdp"],
        pytest.param(["accelerate_fsdp"], marks=pytest.mark.exhaustive),
    ],
    ids=["trainers", "accelerate"],
)
def test_every_rank_trains_to_the_plain_bits(kinds: list[str]) -> None:
    command = [*torchrun(2)[:-1], "tests.integrations.two_processes", *kinds]
    found = json.loads(run(command=command).out.splitlines()[-1])
    expected = {kind: {"same": True, "recomputes": True, "sharded": "fsdp" in kind} for kind in kinds}
    assert found == [expected] * 2
