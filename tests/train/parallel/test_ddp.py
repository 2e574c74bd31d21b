"""DistributedDataParallel around a planned model: every rank's training is the plain one."""

from __future__ import annotations

import json

import pytest

from tests.train.launch.launching import run, torchrun


@pytest.mark.slow
def test_a_static_graph_in_two_processes_whenever_fit_is_called() -> None:
    command = [*torchrun(2)[:-1], "tests.train.parallel.wrapped_steps"]
    found = json.loads(run(command=command).out.splitlines()[-1])
    assert found == [{"before": True, "after": True, "wrapped": True}] * 2
