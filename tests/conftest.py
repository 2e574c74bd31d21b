"""Shared by all tests: fixed costs of operations, one thread, a quiet profiler, and no cost cache; and a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import fixed_costs

if TYPE_CHECKING:
    import torch  # at run time not here: some tests run where torch is blocked

ROOT = Path(__file__).parents[1]

fixed_costs.install()
# Of this process, before it imports torch, and of those that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(fixed_costs.STARTUP), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# With a cache, what fits would depend on which tests ran before: an operation that is known is not run alone again.
os.environ["TIGHTFIT_COST_CACHE"] = "off"
# Models here are so small that a second thread costs more than it brings; and workspaces grow with threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch.profiler's library reads it when torch is imported


@pytest.fixture
def measured_costs() -> Iterator[None]:
    """Operations and the mechanism are timed, as for users."""
    with fixed_costs.measured():
        yield


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine that seems to have two GPUs; the devices that were made current."""
    import torch

    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    """A group of processes that has this one only."""
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
