"""The model of the caching allocator, against PyTorch's own: random requests, and those of training steps.

Thousands of sequences: ``python -m tests.emulated_cuda.fuzz_allocator --count 5000``.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from tests.emulated_cuda import fuzz_allocator
from tests.emulated_cuda.fuzz_allocator import SETTINGS, Step, check_in_process
from tightfit.simulation.allocator_settings import AllocatorSettings

SEQUENCES = 20


@pytest.mark.parametrize("settings", SETTINGS)
def test_random_requests(settings: str) -> None:
    found = check_in_process(settings, SEQUENCES, seed=0)
    assert found["differences"] == []
    assert found["traces"] == SEQUENCES
    # Capacity, caps and flushes are part of it.
    assert found["ran out"] > 0
    assert found["flushes"] > 0


def test_a_wrong_rule_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = AllocatorSettings(large_segment_bytes=22 * 2**20)
    difference, _ = fuzz_allocator.first_difference([Step("allocate", 3_000_000)], wrong)
    assert "step 0" in difference
    traces = [fuzz_allocator.random_trace(random.Random(number)) for number in range(5)]
    monkeypatch.setattr("tightfit.simulation.caching_allocator._SMALL_BYTES", 2**20 - 512)
    assert any(fuzz_allocator.first_difference(trace, AllocatorSettings())[0] for trace in traces)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_training_steps(settings: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.emulated_cuda.training_traces", "--json"],
        env={**os.environ, "PYTORCH_ALLOC_CONF": settings},
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout or "[]")
    assert [one["difference"] for one in found if one["difference"]] == [], done.stderr
    assert len(found) >= 12, done.stderr
    # Segments that grow leave less to flush, so that more of the capped trainings end early.
    assert all(one["segments"] > 0 and (one["requests"] > 200 or one["ran_out"]) for one in found)
    assert 1 <= sum(one["ran_out"] for one in found) <= 2
    assert sum(one["retries"] > 0 for one in found) >= 2
