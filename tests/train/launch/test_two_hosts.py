"""Two hosts of two processes each, under torchrun: each host is a network namespace with its own address."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.train.launch.launching import GPT, alone, finish, losses, start, torchrun

RENDEZVOUS = ["--master-addr", "10.77.0.1", "--master-port", "29517"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """For each of two hosts, what to put before a command to have it run there."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` to make network namespaces with")
    names = [f"tightfit-{os.getpid()}-{number}" for number in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1])
            for place, name in enumerate(names):
                ip("-n", name, "addr", "add", f"10.77.0.{place + 1}/24", "dev", f"veth{place}")
                for device in ("lo", f"veth{place}"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as refused:
            pytest.skip(f"network namespaces cannot be made here: {refused.stderr.decode().strip()}")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.exhaustive  # `test_runs.py` has torchrun, and two starters that meet at an address
@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_two_hosts_train_like_one_process(hosts: list[list[str]]) -> None:
    """One strategy: what differs between them is the same on one host, where `tests/train/parallel` tries it."""
    steps = [*GPT, "--steps", "4"]
    alone(*steps, "--mark", "one")
    running = []
    for number, before in enumerate(hosts):
        command = [*before, *torchrun(2, sys.executable)]
        place = command.index("--standalone")
        command[place : place + 1] = ["--nnodes", "2", "--node-rank", str(number), *RENDEZVOUS]
        options = ["--mark", "two", "--memory", "950KiB", "--json"]
        running.append(start(*steps, *options, command=command, GLOO_SOCKET_IFNAME=f"veth{number}"))
    first, second = map(finish, running)
    assert [first.code, second.code] == [0, 0], first.err + second.err
    found = json.loads(first.out.splitlines()[-1])
    assert found["processes"] == 4
    assert found["measured_peak_bytes"] <= found["budget_bytes"] < found["plain_peak_bytes"]
    assert second.out == ""  # rank 0 alone speaks
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
