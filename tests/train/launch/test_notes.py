"""Notes between processes: there when they were left, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore

from tests.train.launch.launching import free_port
from tightfit.distributed.notes import Notes


@pytest.mark.parametrize("kind", ["memory", "file", "tcp"])
def test_a_note_is_found_once_it_is_left_and_taken_once(kind: str, tmp_path: Path) -> None:
    stores: dict[str, Store] = {"memory": HashStore(), "file": FileStore(str(tmp_path / "store"), 1)}
    store = stores[kind] if kind in stores else TCPStore("127.0.0.1", free_port(), None, True, wait_for_workers=False)
    here, there = (Notes(PrefixStore("notes", store)) for _ in range(2))
    assert there.take("a") is None
    here.leave("a", [None, {"name": "ä"}])
    assert there.take("a") == [None, {"name": "ä"}]
    assert there.take("a") is None
