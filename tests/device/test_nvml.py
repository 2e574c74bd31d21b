"""What the driver's library tells about processes: a stand-in plays it, and `tests/emulated_cuda` has another."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tightfit.device import nvml
from tightfit.device.nvml import process_bytes


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    nvml._library.cache_clear()
    yield
    nvml._library.cache_clear()


def driver(processes: dict[int, int], handles: tuple[bytes, ...] = (b"GPU-u",), **changed: Any) -> SimpleNamespace:
    def running(gpu: Any, count: Any, found: Any) -> int:
        assert count._obj.value == len(found) >= len(processes)
        count._obj.value = len(processes)
        for place, (found[place].pid, found[place].used_bytes) in enumerate(processes.items()):
            assert place < len(found)
        return 0

    functions = {
        "nvmlInit_v2": lambda: 0,
        "nvmlDeviceGetHandleByUUID": lambda name, handle: 0 if name in handles else 6,
        "nvmlDeviceGetComputeRunningProcesses_v3": running,
    }
    return SimpleNamespace(**{name: call for name, call in {**functions, **changed}.items() if call is not None})


@pytest.mark.parametrize(
    ("library", "told"),
    [
        (driver({7: 10, 8: 2**64 - 1}), {7: 10}),
        (driver({7: 10}, handles=(b"MIG-u",)), {7: 10}),
        (driver({7: 10}, handles=()), {}),
        (driver({}), {}),
        (driver({7: 10}, nvmlInit_v2=lambda: 9), {}),
        (driver({7: 10}, nvmlDeviceGetComputeRunningProcesses_v3=lambda *_: 3), {}),
        (driver({7: 10}, nvmlDeviceGetComputeRunningProcesses_v3=None), {}),
        (driver({7: 10}, nvmlDeviceGetHandleByUUID=None), {}),
    ],
)
def test_what_the_driver_tells(library: SimpleNamespace, told: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert process_bytes("u") == told


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert process_bytes("u") == {}
