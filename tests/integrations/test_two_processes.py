"""Hosts that train in two processes: every rank's training is the plain one."""

from __future__ import annotations

import json

import pytest

from tests.train.launch.launching import run, torchrun

pytest.importorskip("accelerate")
pytest.importorskip("lightning")


@pytest.mark.slow
def test_the_trainers_of_transformers_and_lightning() -> None:
    kinds = ["trainer_ddp", "lightning_ddp", "trainer_fsdp"]
    command = [*torchrun(2)[:-1], "tests.integrations.two_processes", *kinds]
    found = json.loads(run(command=command).out.splitlines()[-1])
    expected = {kind: {"same": True, "recomputes": True, "sharded": "fsdp" in kind} for kind in kinds}
    assert found == [expected] * 2
