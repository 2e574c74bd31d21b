"""These tests run where the libraries of requirements.txt are: under `make test-cuda`. Elsewhere they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.extras import is_installed

HERE = Path(__file__).parent
LIBRARIES = ("bitsandbytes", "liger_kernel", "peft", "torchao", "torchvision")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in LIBRARIES if not is_installed(name)]
    for item in items:
        if item.path.parent == HERE and missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}: make test-cuda"))
