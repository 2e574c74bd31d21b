from __future__ import annotations

import pytest

from benchmarks import tape_overhead


def test_every_variant_gives_the_plain_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape_overhead, "ROUNDS", 2)
    found = tape_overhead.run(*tape_overhead.CPU_SIZES["tiny block (nothing but overhead), 8 tokens"])
    assert found["replayed"] > 0
    assert all(found["equal"].values())
    assert set(found["wall"]) == set(found["host"]) > {"plain", "nothing recorded", "all recorded", "all dropped"}
