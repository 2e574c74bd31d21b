"""Row 21, "init hangs": of four processes two are started; within the timeout all that wait say which are missing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.train.launch.launching import GPT, finish, free_port, start


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_two_of_four(kind: str) -> None:
    rendezvous = f"tcp://127.0.0.1:{free_port()}" if kind == "tcp" else f"file://{Path('meet').absolute()}"
    flags = ["--world-size", "4", "--dist-url", rendezvous, "--dist-timeout", "8"]
    began = time.monotonic()
    waiting = [start(*GPT, *flags, "--rank", rank) for rank in ("0", "2")]
    for process in waiting:
        ended = finish(process, 60)
        assert ended.code == 2
        assert "2 of 4 processes did not come" in ended.err
        assert "ranks 1, 3" in ended.err
        assert "Traceback" not in ended.err
    assert time.monotonic() - began < 45
    assert not Path("runs").exists()
