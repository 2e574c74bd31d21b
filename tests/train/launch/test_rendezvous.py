"""Name the ranks that did not come, those that came twice, and a port that is taken: "init hangs".

See https://github.com/pytorch/pytorch/issues/52848 and https://github.com/pytorch/pytorch/issues/85604.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.train.launch.launching import GPT, finish, free_port, start
from tightfit.errors import UnsupportedInput
from tightfit.train.launch.rendezvous import sign_in
from tightfit.train.launch.roles import Member

pytestmark = pytest.mark.usefixtures("own_folder")
#: Rank 0 waits so long for the others, which are threads and come at once.
WAIT_S = 3.0


def what_they_say(ranks: list[int], world_size: int, rendezvous: str) -> list[str]:
    """What each of these ranks is refused with, all of them coming at once; empty where it is not."""

    def come(rank: int) -> str:
        member = Member(rank=rank, world_size=world_size, local_rank=rank, shares_node=True, rendezvous=rendezvous)
        try:
            sign_in(member, WAIT_S)
        except UnsupportedInput as refused:
            return str(refused)
        return ""

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(come, ranks))


def rendezvous_of(kind: str) -> str:
    return f"tcp://127.0.0.1:{free_port()}" if kind == "tcp" else f"file://{Path('meet').absolute()}"


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_two_of_four_say_which_are_missing(kind: str) -> None:
    for said in what_they_say([0, 2], 4, rendezvous_of(kind)):
        assert "2 of 4 processes did not reach the rendezvous" in said
        assert "ranks 1, 3" in said


def test_a_rank_that_came_twice() -> None:
    first, *twice = what_they_say([0, 1, 1], 3, rendezvous_of("tcp"))
    assert "1 of 3 processes did not reach the rendezvous" in first
    assert "rank 2" in first
    assert sum("rank 1 is there twice" in said for said in twice) == 1


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rendezvous = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        ended = finish(start(*GPT, "--world-size", "2", "--rank", "0", "--dist-url", rendezvous, "--dist-timeout", "5"))
    assert ended.code == 2
    assert f"the port of {rendezvous} is in use" in ended.err
    assert "Traceback" not in ended.err
    assert not Path("runs").exists()
