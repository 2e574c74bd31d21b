"""Row 20, "EADDRINUSE 29500": two jobs that start their own processes run side by side; ranks that came twice and ports
that are taken have a name.
"""

from __future__ import annotations

import socket
import time

import pytest

from tests.train.launch.launching import GPT, TWO, finish, free_port, losses, start

pytestmark = pytest.mark.usefixtures("own_folder")


def test_two_jobs_side_by_side() -> None:
    jobs = [start(*GPT, *TWO, "--steps", "2", "--mark", mark) for mark in ("a", "b")]
    assert [finish(job).code for job in jobs] == [0, 0]
    assert losses("a") == losses("b")


def test_a_rank_that_came_twice() -> None:
    rendezvous = ["--world-size", "3", "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--dist-timeout", "60"]
    first = start(*GPT, *rendezvous, "--rank", "0")
    twice = [start(*GPT, *rendezvous, "--rank", "1") for _ in range(2)]
    codes = []
    try:
        while not codes:
            time.sleep(0.1)
            codes = [process.poll() for process in twice if process.poll() is not None]
        assert codes == [2]
        ended = next(finish(process) for process in twice if process.poll() is not None)
        assert "tightfit: rank 1: rank 1 is there twice" in ended.err
    finally:
        for process in (first, *twice):
            process.kill()
            process.communicate()


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rendezvous = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        ended = finish(start(*GPT, "--world-size", "2", "--rank", "0", "--dist-url", rendezvous, "--dist-timeout", "5"))
    assert ended.code == 2
    assert f"the port of {rendezvous} is in use" in ended.err
    assert "Traceback" not in ended.err
