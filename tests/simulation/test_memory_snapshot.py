"""A predicted step as a snapshot of the allocator: consistent in itself, and with what is predicted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.solver.profiles import gpt_profile
from tightfit.simulation.memory_snapshot import memory_snapshot


def test_blocks_fill_their_segments_and_the_trace_leads_to_them() -> None:
    profile = gpt_profile(2)
    snapshot = memory_snapshot(profile, [None] * len(profile.regions))
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == address
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]
    alive: dict[int, int] = {}
    for entry in snapshot["device_traces"][0]:
        if entry["action"] == "alloc":
            assert entry["addr"] not in alive
            alive[entry["addr"]] = entry["size"]
        elif entry["action"] == "free_completed":
            del alive[entry["addr"]]
    assert alive == {block["address"]: block["requested_size"] for block in _used(snapshot)}


def _used(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    return [b for segment in snapshot["segments"] for b in segment["blocks"] if b["state"] == "active_allocated"]


def test_pytorch_draws_it() -> None:
    """With its own ``torch.cuda._memory_viz``, which reads what pytorch.org/memory_viz opens."""
    viewer = pytest.importorskip("torch.cuda._memory_viz", exc_type=ImportError)
    profile = gpt_profile(2)
    snapshot = memory_snapshot(profile, [None] * len(profile.regions))
    for draw in (viewer.trace_plot, viewer.segment_plot):
        assert "add_local_files" in draw(snapshot)
    parts = viewer.memory(snapshot, format_flamegraph=str).splitlines()
    assert sum(int(part.rsplit(" ", 1)[1]) for part in parts) == sum(one["total_size"] for one in snapshot["segments"])
    assert "alloc" in viewer.trace(snapshot)
    assert viewer.segsum(snapshot)
