"""Checkpoints that are written while the run goes on, and a disk that does not take them."""

from __future__ import annotations

import errno
import os
import threading
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed import HashStore

from tests.support.late_writes import written_late
from tests.train.runs import metrics
from tightfit.cli.main import main
from tightfit.distributed.notes import Notes
from tightfit.distributed.process_group import ProcessGroup
from tightfit.errors import remedy_for
from tightfit.report.reporter import Reporter
from tightfit.train.checkpoint import Draft
from tightfit.train.checkpoint_writer import CheckpointWriter
from tightfit.train.loop import OptimizerStep
from tightfit.train.shard_files import Piece

DATA = "tests.train.user_code-numbers"
WORDS = ["train", "--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:numbers"]
WORDS += ["--batch-size", "8", "--steps", "6", "--log-every", "1", "--save-every", "2", "--ema-decay", "0.5"]

pytestmark = pytest.mark.usefixtures("own_folder")


def files_of(mark: str) -> dict[str, bytes]:
    """What the checkpoints of a run hold."""
    folder = Path(f"runs/{DATA}/{mark}/checkpoints")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("step-*/*.safetensors")}
    assert found
    return found


def test_what_is_saved_while_steps_go_on_is_the_state_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*WORDS, "--mark", "tight", "--memory", "2500B"]) == 0  # no room for a copy
    threads = set()
    taken, late = written_late(lambda *_: threads.add(threading.current_thread().name))
    with monkeypatch.context() as patch:
        patch.setattr(OptimizerStep, "take", taken)
        patch.setattr(Draft, "write_tensors", late)
        assert main([*WORDS, "--mark", "ample", "--memory", "64MiB"]) == 0
    assert threads == {"checkpoint"}
    assert files_of("ample") == files_of("tight")


def test_a_copy_that_does_not_fit_beside_the_step_is_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--mark", "m", "--memory", "2500B"]) == 0
    assert capsys.readouterr().out.count("to write them from does not fit beside the step") == 1


def test_a_copy_is_in_the_logged_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*WORDS, "--mark", "before", "--save-every", "100"]) == 0
    written = threading.Event()
    write = Draft.write_tensors

    def slow(self: Draft, temporary: Path, rank: int = 0) -> Any:
        written.wait(60)
        return write(self, temporary, rank)

    monkeypatch.setattr(Draft, "write_tensors", slow)
    copies: list[int] = []
    add = OptimizerStep.take

    def taken(self: OptimizerStep, microbatches: Any) -> Any:
        copies.append(1)
        if len(copies) == 4:
            written.set()  # step 4 saves again, and would wait
        return add(self, microbatches)

    monkeypatch.setattr(OptimizerStep, "take", taken)
    assert main([*WORDS, "--mark", "with"]) == 0
    peaks = [[line["peak_bytes"] for line in metrics(f"{DATA}/{mark}")] for mark in ("before", "with")]
    assert peaks[0][1] == peaks[1][1]
    assert peaks[0][2] < peaks[1][2]  # step 3, during which the checkpoint of step 2 is written


@pytest.mark.parametrize("memory", ["2500B", "64MiB"])
def test_a_full_disk_at_a_save_is_said_and_the_next_one_is_tried(
    memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = Draft.write_tensors

    def full(self: Draft, temporary: Path, rank: int = 0) -> Any:
        if self.step == 4:
            (temporary / "part").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return tensors(self, temporary, rank)

    monkeypatch.setattr(Draft, "write_tensors", full)
    assert main([*WORDS, "--mark", "m", "--memory", memory]) == 0
    said = capsys.readouterr().out
    assert "the checkpoint of step 4 could not be written" in said
    assert "No space left on device" in said
    assert "The checkpoints written before are complete. The run goes on" in said
    folder = Path(f"runs/{DATA}/m/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002", "step-00000006"]


def test_rows_that_a_full_disk_does_not_take_are_written_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tightfit.train import run_metrics

    append, calls = run_metrics.append_text, []

    def full(path: Path, text: str) -> None:
        calls.append(text)
        if 3 <= len(calls) <= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, text)

    monkeypatch.setattr(run_metrics, "append_text", full)
    assert main([*WORDS, "--mark", "m"]) == 0
    assert capsys.readouterr().out.count("metrics.jsonl could not be written") == 1
    assert [line["step"] for line in metrics(f"{DATA}/m")] == [1, 2, 3, 4, 5, 6]


def test_the_last_checkpoint_is_worth_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Draft, temporary: Path, rank: int = 0) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "write_tensors", full)
        assert main([*WORDS, "--mark", "m", "--save-every", "100"]) == 1
    assert "Make room there, and go on with --resume auto" in capsys.readouterr().err
    assert list(Path(f"runs/{DATA}/m/checkpoints").iterdir()) == []
    assert main([*WORDS, "--mark", "m", "--save-every", "100", "--resume", "auto"]) == 0
    assert main([*WORDS, "--mark", "whole"]) == 0
    one, other = (files_of(mark)["step-00000006/training.safetensors"] for mark in ("m", "whole"))
    assert one == other
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "Make room"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/a/file"), "disk fails"),
        (SafetensorError("Error while serializing: IoError(Os { Input/output error (os error 5) })"), "disk fails"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "mount it anew"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "ulimit -f"),
        (OSError(errno.ENOTTY, os.strerror(errno.ENOTTY)), "written to again"),
    ],
)
def test_what_to_do_fits_what_has_happened(problem: Exception, remedy: str) -> None:
    """A disk that failed was answered with "make room"."""
    assert remedy in remedy_for(str(problem))


class WithAnother(ProcessGroup):
    """Rank 0 of two; the other one's answer is given."""

    other: Any

    def all_gather(self, thing: Any) -> list[Any]:
        return [thing, self.other]


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        ((16, 100), (True, 16, 100), ""),
        (
            (16, 100),
            (False, 2048, 1024),
            "2.0 KiB to write them from in rank 1 does not fit beside the step, which leaves 1.0",
        ),
        ((16, 8), (True, 16, 100), "16 B to write them from in rank 0 does not fit beside the step, which leaves 8 B"),
        ((16, 100), (False, 16, 100), "16 B to write them from in rank 1 cannot be had, of 100 B"),
        ((0, -1), (True, 16, 100), ""),
    ],
)
def test_shards_are_copied_by_all_processes_or_by_none(
    here: tuple[int, int], there: tuple[bool, int, int], said: str, tmp_path: Path
) -> None:
    group = WithAnother(rank=0, world_size=2, control=object(), notes=Notes(HashStore()))
    object.__setattr__(group, "other", there)
    stream = StringIO()
    nothing: Any = None
    writer = CheckpointWriter(
        folder=tmp_path,
        work=SimpleNamespace(group=group),  # type: ignore[arg-type]  # all that is asked for
        average=nothing,
        scaler=nothing,
        progress=nothing,
        identity={},
        retention=nothing,
        metrics=None,
        reporter=Reporter(stream),
        room_bytes=here[1],
    )
    pieces = [Piece("w@0", torch.ones(here[0] // 4))] if here[0] else []
    draft = Draft(checkpoints=tmp_path, step=1, state={}, pieces=pieces, is_best=False, is_whole=False)
    copies = [writer._copies_everywhere(draft) for _ in range(2)][-1]
    assert stream.getvalue().count("steps wait for checkpoints") == bool(said)  # once
    assert said in stream.getvalue()
    if said:
        assert copies is None
    else:
        assert copies is not None
        assert [(piece.name, piece.tensor.tolist()) for piece in copies] == [
            (p.name, p.tensor.tolist()) for p in pieces
        ]
        assert all(copy.tensor is not piece.tensor for copy, piece in zip(copies, pieces, strict=True))
