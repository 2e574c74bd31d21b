"""Which process of a run is named as the one that failed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tightfit.train.launch.launcher import _process_failed, noting_failure
from tightfit.train.launch.roles import RUN_ID_PREFIX


def failed(**codes: int) -> ChildFailedError:
    """What the agent raises where it sees these ranks' exit codes, all in one second."""
    failures = {int(name[1:]): (int(name[1:]), code) for name, code in codes.items()}
    return ChildFailedError(
        "run", {rank: ProcessFailure(local, 1000 + rank, code, "none") for rank, (local, code) in failures.items()}
    )


class Signalled(BaseException):
    """As the command line raises where a signal comes outside of the training loop."""


def fail(
    rank: int,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: str = RUN_ID_PREFIX,
    error: type[BaseException] = ValueError,
) -> None:
    """Fail as the process of a rank."""
    folder = notes / "run" / "attempt_0" / str(rank)
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"{run}1")
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(error, match="bad"), noting_failure():
        raise error("bad")


def test_a_signal_to_one_rank_is_what_the_run_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others fail as that one is gone: the run ended with exit code 1, and named one of them."""
    fail(1, tmp_path, monkeypatch, error=Signalled)
    fail(0, tmp_path, monkeypatch)
    found = _process_failed(failed(r0=1, r1=143), tmp_path)
    assert found.exit_code == 143
    assert str(found).startswith("rank 1 (process ")


def test_the_first_to_fail_is_named_though_the_agent_saw_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (1, 0):
        fail(rank, tmp_path, monkeypatch)
    assert str(_process_failed(failed(r0=1), tmp_path)).startswith("rank 1 (process ")
    assert str(_process_failed(failed(r0=1, r1=1), tmp_path)).startswith("rank 1 (process ")
    assert _process_failed(failed(r0=1, r1=2), tmp_path).exit_code == 2
    assert _process_failed(failed(r0=-signal.SIGTERM, r1=2), tmp_path).exit_code == 2
    for ended_by_agent in (-signal.SIGTERM, 128 + signal.SIGTERM):  # it may obey the signal, or end with its code
        on_its_way_out = _process_failed(failed(r0=2, r1=ended_by_agent), tmp_path)
        assert str(on_its_way_out).startswith("rank 1 (process ")
        assert on_its_way_out.exit_code == 2


def test_one_that_was_killed_is_named_before_those_that_waited_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(0, tmp_path, monkeypatch)
    ended_by_agent = -signal.SIGTERM
    for seen in (
        failed(r1=-signal.SIGKILL),
        failed(r0=1, r1=-signal.SIGKILL),
        failed(r0=ended_by_agent, r1=-signal.SIGKILL),
    ):
        problem = _process_failed(seen, tmp_path)
        assert str(problem).startswith("rank 1 (process 1001) was killed by SIGKILL")
        assert problem.exit_code == 1


def test_without_a_note_the_agent_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(1, tmp_path, monkeypatch, run="another-launcher")
    assert str(_process_failed(failed(r0=3), tmp_path)).startswith("rank 0 (process 1000) ended with exit code 3")
