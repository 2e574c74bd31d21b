"""Shared by the tests of the engine."""

from __future__ import annotations

import pytest

from tightfit.profiling import costs
from tightfit.profiling import measure as profiler
from tightfit.profiling.mechanism_cost import Overhead


@pytest.fixture
def _cheap_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not matter here, only bytes."""
    monkeypatch.setattr(profiler, "measure_overhead", lambda *_: Overhead(0.001, 0.001, 0.0005, 0.001))
    monkeypatch.setattr(costs, "_time_ms", lambda *_, **__: 0.01)
