"""Hosts that train in two processes: every rank's training is the plain one."""

from __future__ import annotations

import json

import pytest

from tests.train.launch.launching import run, torchrun

pytest.importorskip("accelerate")
pytest.importorskip("lightning")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "trainer_fsdp",
        pytest.param("trainer_ddp", marks=pytest.mark.exhaustive),
        pytest.param("lightning_ddp", marks=pytest.mark.exhaustive),
        pytest.param("accelerate_fsdp", marks=pytest.mark.exhaustive),
    ],
)
def test_every_rank_trains_to_the_plain_bits(kind: str) -> None:
    command = [*torchrun(2)[:-1], "tests.integrations.two_processes", kind]
    found = json.loads(run(command=command).out.splitlines()[-1])
    assert found == [{kind: {"same": True, "recomputes": True, "sharded": "fsdp" in kind}}] * 2
