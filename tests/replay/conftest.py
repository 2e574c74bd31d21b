"""Shared by the tests of the engine."""

from __future__ import annotations

import pytest

from recollect.measure import costs, profiler
from recollect.measure.overhead import Overhead


@pytest.fixture
def _cheap_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not matter here, only bytes."""
    monkeypatch.setattr(profiler, "measure_overhead", lambda *_: Overhead(0.001, 0.001, 0.0005, 0.001))
    monkeypatch.setattr(costs, "_time_ms", lambda *_, **__: 0.01)
