"""Shared by all tests: one thread, a quiet profiler, a fixed seed, and a cost cache of their own; and a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch  # at run time not here: some tests run where torch is blocked

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch.profiler's library reads it when torch is imported


@pytest.fixture(autouse=True, scope="session")
def cost_cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's own cache of operation costs is neither read nor written; within a session, costs are shared."""
    before = {name: os.environ.get(name) for name in ("TIGHTFIT_CACHE_DIR", "TIGHTFIT_COST_CACHE")}
    os.environ["TIGHTFIT_CACHE_DIR"] = str(tmp_path_factory.mktemp("tightfit-cache"))
    os.environ.pop("TIGHTFIT_COST_CACHE", None)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


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
    """An empty working folder, from which the project's tests can still be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
