"""Loaded by `make test-cuda`: there, a test that is skipped has failed.

What a test skips for, a device or a library, is there; so nothing is skipped, or the devices went missing and all the
tests would be silently gone. What cannot run is deselected by its marker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulated_cuda import counters


def pytest_configure(config: pytest.Config) -> None:
    if not counters.is_active():
        raise pytest.UsageError(
            "This process is not on the emulated CUDA runtime, without which these tests have no device. "
            "Start it with: python -m tests.emulated_cuda.run python -m pytest ..."
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    fail_if_skipped(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome: Any = yield
    fail_if_skipped(outcome.get_result())


def fail_if_skipped(report: Any) -> None:
    """Make a failure of a report that says "skipped"; expected failures say that, too, and are left."""
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"It was skipped ({reason}), which `make test-cuda` does not accept."
