"""These tests run under `make test-cuda`; elsewhere they are skipped, but for those of the build."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated_cuda import counters

HERE = Path(__file__).parent
#: Needs no device and no CUDA build.
ANYWHERE = "test_build.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if counters.is_active():
        return
    for item in items:
        if item.path.parent == HERE and item.path.name != ANYWHERE:
            item.add_marker(pytest.mark.skip(reason="needs the emulated CUDA runtime: make test-cuda"))
