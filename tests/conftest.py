"""Shared by all tests: nothing that decides a test's outcome comes from the machine or from the test before it.

Costs of operations are fixed (`fixed_costs`), there is no cost cache and one thread, random numbers begin from one
seed, and PyTorch's and the process's settings are put back.  Markers follow from a test's folder (`subjects`);
what needs an extra that is not installed is skipped (`extras`).
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.support import extras, fixed_costs
from tests.support.subjects import subject_of

if TYPE_CHECKING:  # at run time not here: some tests run where torch is blocked
    import torch
    from torch.distributed.device_mesh import DeviceMesh

ROOT = Path(__file__).parents[1]

fixed_costs.install()
extras.skip_what_needs_missing_ones()
# Of this process, before it imports torch, and of those that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(fixed_costs.STARTUP), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# With a cache, what fits would depend on which tests ran before: an operation that is known is not run alone again.
os.environ["TIGHTFIT_COST_CACHE"] = "off"
# Models here are so small that a second thread costs more than it brings; and workspaces grow with threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples at every run, however long one takes on a busy machine.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-exhaustive` gives."""
    parser.addoption("--exhaustive", action="store_true", help="run the tests marked exhaustive, too")


def pytest_configure(config: pytest.Config) -> None:
    """pytest-randomly draws the order only: what a test computes does not depend on its seed (see `_begin_anew`)."""
    config.option.randomly_reset_seed = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with the subject of its folder; leave out those that are marked exhaustive."""
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    for item in items:
        subject = subject_of(item.path.relative_to(ROOT / "tests").as_posix())
        if subject is not None:
            item.add_marker(subject)


# ------------------------------------------------------------------------------------- nothing of what ran before


def _begin_anew() -> None:
    """Random numbers from the start, in whichever libraries are there; nothing that the process knows of others."""
    if (differing := sys.modules.get("tightfit.operators.differing_calls")) is not None:
        differing._barred.clear()  # calls that were once seen to differ
    if (accelerate := sys.modules.get("accelerate.state")) is not None:
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Before a module is imported, which may draw its data."""
    if isinstance(collector, pytest.Module):
        _begin_anew()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Before a fixture that several tests share, whichever of them comes first."""
    if fixturedef.scope != "function":
        _begin_anew()


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Each test begins from the same random numbers, and leaves the process's settings as they were."""
    environment = dict(os.environ)
    torch = sys.modules.get("torch")
    settings = () if torch is None else _torch_settings()
    _begin_anew()
    gc.collect()  # of what ran before
    gc.freeze()  # measuring collects garbage: let it not walk over all that was imported
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if torch is not None and _torch_settings() != settings:
        threads, deterministic, warn_only, dtype, precision, grad, autocast = settings
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.set_grad_enabled(grad)
        torch.set_autocast_enabled("cpu", autocast)


def _torch_settings() -> tuple[object, ...]:
    torch = sys.modules["torch"]
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


# ------------------------------------------------------------------------------------------------------- fixtures


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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1].index if taken else 0)
    return taken


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    """A group of processes that has this one only."""
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone, for `fully_shard`."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        gc.collect()  # sharded models hold the group
        dist.destroy_process_group()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
