"""Parts of a checkpoint that several processes write while steps go on: whole or not at all, without endless waits."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from tightfit.distributed.notes import Notes
from tightfit.distributed.process_group import ProcessGroup
from tightfit.train.background_write import BackgroundWrite
from tightfit.train.checkpoint import Draft, read_checkpoint, read_training_state
from tightfit.train.plain_state import pack
from tightfit.train.shard_files import Piece

WEIGHT = torch.arange(8.0).view(4, 2)


def draft(folder: Path, rank: int) -> Draft:
    """What one of two processes writes: two rows of a weight."""
    _, training = pack({"model": {"w": WEIGHT}, "optimizer": {}, "random": [], "extra": {}})
    training["dict"]["model"]["dict"]["w"]["shape"] = [4, 2]
    rows: Tensor = WEIGHT[2 * rank : 2 * rank + 2].clone()
    state = {"step": 3, "identity": {}, "progress": {}, "training": training}
    pieces = [Piece(f"model.w@{2 * rank},0", rows)]
    return Draft(checkpoints=folder, step=3, state=state, pieces=pieces, is_best=False, is_whole=False)


def groups() -> list[ProcessGroup]:
    """Two processes of one run, as far as their threads can tell."""
    store = HashStore()
    return [ProcessGroup(rank=rank, world_size=2, control=object(), notes=Notes(store)) for rank in range(2)]


def begin(folder: Path, ranks: tuple[int, ...] = (0, 1)) -> list[BackgroundWrite]:
    temporary = draft(folder, 0).begin()
    everyones = groups()
    return [
        BackgroundWrite(draft(folder, rank), temporary, everyones[rank], (1,) if rank == 0 else (), 1) for rank in ranks
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_the_parts_of_all_become_a_checkpoint_whoever_is_first(ranks: tuple[int, ...], tmp_path: Path) -> None:
    for write in begin(tmp_path, ranks):
        write.join()
        assert (write.problem, write.held_bytes, write.nbytes) == (None, 0, 16)
    assert names(tmp_path) == ["latest", "step-00000003"]
    assert torch.equal(read_training_state(read_checkpoint(tmp_path / "latest").folder)["model"]["w"], WEIGHT)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (MemoryError(), "there is no memory left to write it"),
        (ZeroDivisionError("what nobody has thought of"), "what nobody has thought of"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_part_that_cannot_be_written_is_told_to_rank_0(
    failing: int, error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors = Draft.write_tensors

    def full(self: Draft, temporary: Path, rank: int = 0) -> Any:
        if rank == failing:
            raise error
        return write_tensors(self, temporary, rank)

    monkeypatch.setattr(Draft, "write_tensors", full)
    first, second = begin(tmp_path)
    second.join()
    first.join()
    assert first.problem == said
    assert second.problem == (said if failing == 1 else None)
    assert names(tmp_path) == []


def test_a_commit_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Draft, temporary: Path, written: object) -> Path:
        raise ZeroDivisionError("no commit")

    monkeypatch.setattr(Draft, "commit", broken)
    first, _ = begin(tmp_path)
    first.join()
    assert first.problem == "no commit"
    assert names(tmp_path) == []


def test_a_process_that_is_gone_is_not_waited_for_at_the_end(tmp_path: Path) -> None:
    (first,) = begin(tmp_path, (0,))
    first.wait_for_part()
    assert not first.is_over
    first.join(patience_s=0)
    assert first.problem == "rank 1 has not written its part"
    assert names(tmp_path) == []


def test_without_a_thread_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_memory)
    second, first = begin(tmp_path, (1, 0))
    assert first.is_over
    assert second.is_over
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_a_copy_is_held_until_its_part_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors: Callable[..., Any] = Draft.write_tensors
    may_write = threading.Event()

    def late(self: Draft, temporary: Path, rank: int = 0) -> Any:
        may_write.wait(60)
        return write_tensors(self, temporary, rank)

    monkeypatch.setattr(Draft, "write_tensors", late)
    (first,) = begin(tmp_path, (0,))
    assert first.held_bytes == 16
    may_write.set()
    first.wait_for_part()
    assert first.held_bytes == 0
    assert not first.is_over  # it waits for rank 1's
    first.join(patience_s=0)
