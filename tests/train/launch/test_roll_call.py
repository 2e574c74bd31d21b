"""A process that is stopped, or hangs in the user's code, ends the run and is named."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.train.launch.launching import GPT, PATIENCE_S, REAL, TWO, finish, logged, start
from tightfit.distributed.process_group import CommunicationFailed, Whereabouts
from tightfit.train.launch.roll_call import RollCall
from tightfit.train.signals import Interrupted


def two_of(store: dist.Store, told: list[Exception]) -> list[RollCall]:
    return [
        RollCall(
            store,
            rank=rank,
            world_size=2,
            whereabouts=Whereabouts(f"in step {rank + 7}"),
            silence_s=2,
            give_up=told.append,
        )
        for rank in range(2)
    ]


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)


def wait_for(told: list[Exception]) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while not told:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return str(told[0])


def test_who_says_nothing_is_named_with_what_it_did(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightfit.train.launch.roll_call._OTHERS_ERROR_S", 0.1)
    told: list[Exception] = []
    here, _silent = two_of(store, told)
    with here:
        said = wait_for(told)
    assert f"rank 1 (process {os.getpid()} on" in said
    assert "in step 8) has said nothing for" in said
    assert "--resume auto" in said


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process")
def test_who_is_silent_because_it_was_stopped_is_continued(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever started it waits for half a minute before it is killed."""
    monkeypatch.setattr("tightfit.train.launch.roll_call._OTHERS_ERROR_S", 0.1)
    told: list[Exception] = []
    here, _ = two_of(store, told)
    with subprocess.Popen(["sleep", "60"]) as stopped:
        store.set("roll-call/1", f"0|{stopped.pid}|{socket.gethostname()}|in step 8")
        stopped.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
        with here:
            wait_for(told)
        assert os.waitid(os.P_PID, stopped.pid, os.WCONTINUED) is not None
        stopped.kill()


def test_who_has_ended_by_an_error_is_named(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightfit.train.launch.roll_call._OTHERS_ERROR_S", 0.1)
    told: list[Exception] = []
    here, other = two_of(store, told)
    with here:
        with pytest.raises(ValueError, match="no"), other:
            raise ValueError("no")
        assert "rank 1 has ended, so this one ends, too" in wait_for(told)


@pytest.mark.parametrize("error", [None, Interrupted(15, "stopped")])
def test_who_leaves_in_good_order_is_not(store: dist.Store, error: Exception | None) -> None:
    told: list[Exception] = []
    here, other = two_of(store, told)
    with here:
        other.__enter__()
        other.__exit__(type(error) if error else None, error, None)
        time.sleep(3)  # longer than anyone may be silent
    assert told == []


def test_a_collective_that_failed_tells_where_the_others_are(store: dist.Store) -> None:
    here, other = two_of(store, [])
    with here, other:
        explained = here.explain(CommunicationFailed("it failed."))
    assert re.fullmatch(r"it failed\. Of the others, rank 1 \(process \d+ on .+, in step 8\) runs\.", str(explained))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("own_folder")
def test_a_rank_that_is_stopped_ends_the_run_and_is_named() -> None:
    process = start(*GPT, *TWO, "--steps", "100000", "--mark", "m", "--dist-timeout", "20", command=REAL)
    logged(process, "python-source/m", 2)
    listed = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True)
    ranks = [int(line.split()[0]) for line in listed.stdout.splitlines() if "tightfit" in line]
    os.kill(ranks[1], signal.SIGSTOP)
    ended = finish(process)
    assert ended.code == 1, ended.err
    assert re.search(rf"rank 0: .*rank 1 \(process {ranks[1]} on .*\) has (said nothing|been silent) for", ended.err)
    assert "Traceback" not in ended.err
