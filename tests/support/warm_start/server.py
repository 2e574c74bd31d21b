"""Import what runs need, then fork for each client, see `tests.support.warm_start`."""

from __future__ import annotations

import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch.distributed.elastic.agent.server.local_elastic_agent
import torch.distributed.elastic.rendezvous.dynamic_rendezvous
import torch.distributed.fsdp
import torch.distributed.launcher.api

import tightfit.cli.main
import tightfit.train.loop  # noqa: F401  # for the processes that are forked


@dataclass
class Job:
    """What a new process is to run, as its client sent it."""

    request: dict[str, Any]
    streams: list[int]

    @classmethod
    def read(cls, client: socket.socket) -> Job | None:
        """None: the client is gone."""
        head, streams, _, _ = socket.recv_fds(client, 8, 3)
        size, message = int.from_bytes(head, "big"), b""
        while head and len(message) < size:
            part = client.recv(size - len(message))
            if not part:
                break
            message += part
        if head and len(message) == size:
            return cls(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        return None

    def run(self, executable: str) -> None:
        """Become the process that was asked for."""
        request = self.request
        for number, stream in enumerate(self.streams):
            os.dup2(stream, number)
            os.close(stream)
        if request["unbuffered"]:
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]  # a text stream
        signal.signal(signal.SIGINT, signal.SIG_IGN if request["uninterrupted"] else signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.environ.pop("TIGHTFIT_LAUNCHER", None)  # it has no such child: this one is the server's
        os.chdir(request["folder"])
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        module, *words = request["words"]
        sys.executable = executable
        sys.path[0] = request["folder"]
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def serve(address: str, alive: int) -> Job | None:
    """Return a job, in the process that was forked for it; None once the tests have ended."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    events = selectors.DefaultSelector()
    for source in (listener, alive, woken):
        events.register(source, selectors.EVENT_READ)
    clients: dict[int, socket.socket] = {}  # by process

    def kill(process: int) -> None:
        os.kill(process, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it may not lead its group yet
            os.killpg(process, signal.SIGKILL)

    sys.stdout.write("\n")
    sys.stdout.flush()
    while True:
        for key, _ in events.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                job = Job.read(client)
                if job is None:
                    client.close()
                    continue
                process = os.fork()
                if not process:
                    os.setsid()
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (*clients.values(), client, listener):
                        other.close()
                    for number in (alive, woken, wake):
                        os.close(number)
                    events.close()
                    return job
                for stream in job.streams:
                    os.close(stream)
                clients[process] = client
                events.register(client, selectors.EVENT_READ, process)
            elif key.fileobj == woken:
                os.read(woken, 4096)
                while clients:
                    process, status = os.waitpid(-1, os.WNOHANG)
                    if not process:
                        break
                    with clients.pop(process) as client, suppress(KeyError, OSError):
                        events.unregister(client)  # unless it was killed
                        client.sendall(status.to_bytes(4, "big"))
            elif key.fileobj == alive:
                for process in clients:
                    kill(process)
                return None
            elif key.data in clients:  # it has not ended in this round
                numbers = b""
                with suppress(ConnectionError):
                    numbers = clients[key.data].recv(64)
                for number in numbers:
                    os.kill(key.data, number)
                if not numbers:  # the client was killed
                    events.unregister(clients[key.data])
                    kill(key.data)


def main() -> None:
    address, executable, alive = sys.argv[1:]
    gc.collect()
    gc.freeze()  # what was imported is shared by all processes, and not looked through by any
    job = serve(address, int(alive))
    if job is not None:
        job.run(executable)


if __name__ == "__main__":
    main()
