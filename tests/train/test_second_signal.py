"""A second signal ends a run at once, whatever it does; what was saved before stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tightfit.cli import main as command_line
from tightfit.train.signals import StopRequest

#: Waits as a collective does for a process that is gone: no signal interrupts it, so no handler of Python's runs.
WAITS = """
import ctypes
from tightfit.train.signals import StopRequest
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with StopRequest():
    print("ready", flush=True)
    lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mutex")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_it_ends_a_process_whose_main_thread_waits(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "a second signal: ended at once" in err


def test_two_at_the_same_moment_are_one() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.after_step(1) == signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_handlers_threads_and_descriptors_are_put_back() -> None:
    before, descriptors = signal.getsignal(signal.SIGTERM), set(os.listdir("/proc/self/fd"))
    threads = set(threading.enumerate())
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
        opened = set(os.listdir("/proc/self/fd")) - descriptors
        (thread,) = set(threading.enumerate()) - threads
        assert len(opened) >= 2
    thread.join(60)
    assert not thread.is_alive()
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_a_worker_gets_is_not_counted() -> None:
    """Data loaders end their workers by SIGTERM, after a first signal to the run."""
    script = """
import multiprocessing, os, signal, time
from tightfit.train.signals import StopRequest
with StopRequest() as stop:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(1)
    os.kill(worker.pid, signal.SIGKILL)
    print(int(stop.after_step(1)))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.returncode) == ("15\n", 0), ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_one_that_comes_in_a_finalizer_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python prints what a finalizer raises, and goes on."""

    class Ended:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def run(arguments: list[str]) -> int:
        ended = [Ended()]
        ended.clear()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(command_line, "_run", run)
    assert command_line.main([]) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert said == "tightfit: ended by SIGTERM\n"
