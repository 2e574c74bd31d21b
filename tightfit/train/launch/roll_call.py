"""The roll call of a group: each process says every few seconds that it runs, and looks whether others do.

A process that was stopped, swapped out or cut off neither fails nor closes its connections, so nothing but a
collective's timeout tells the others, and that names nobody.  Here a thread of each process does: its words pass
through the store of the rendezvous, beside all collectives, so that it is heard also while its process waits in one.
Each looks at a few others, so that the store serves any number.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]  # documented

from tightfit.distributed.process_group import CommunicationFailed, Whereabouts
from tightfit.errors import first_line
from tightfit.train.signals import Interrupted

#: At most; of a shorter patience, this share.
_EVERY_S, _SHARE_OF_SILENCE = 2.0, 1 / 20
#: How many calls a process may miss before it is named when a collective fails.
_MISSED = 3
#: For the process that fails to print its error, and for others to end by themselves when a connection to it breaks.
_OTHERS_ERROR_S = 5.0
_WATCHED = 8
_LEFT, _ENDED = "left", "ended"


@dataclass
class _Heard:
    """What was last heard of another process."""

    word: str
    at: float
    """By this process's monotonic clock."""


class RollCall:
    """Answers the roll call inside the context, and ends this process if another one is silent or has ended.

    All processes must have made theirs before one enters the context.

    Args:
        store: the rendezvous's; a clone of it is used.
        rank, world_size: of this process.
        whereabouts: what this process does.
        silence_s: how long another process may say nothing.
        give_up: called in the thread with the error for which this process has to end, and ends it.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        whereabouts: Whereabouts,
        silence_s: float,
        give_up: Callable[[Exception], None],
    ) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]  # documented
        self._store.set_timeout(timedelta(seconds=silence_s))
        self._rank = rank
        self._others = [(rank + ahead) % world_size for ahead in range(1, min(world_size, _WATCHED + 1))]
        self._every_s = min(_EVERY_S, silence_s * _SHARE_OF_SILENCE)
        self._whereabouts = whereabouts
        self._silence_s = silence_s
        self._give_up = give_up
        self._heard: dict[int, _Heard] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="roll-call", daemon=True)
        self._say(0)

    def __enter__(self) -> RollCall:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        with suppress(RuntimeError):
            self._store.set(self._key(self._rank), _LEFT if isinstance(error, Interrupted | None) else _ENDED)

    def explain(self, problem: CommunicationFailed) -> CommunicationFailed:
        """Return the error of a failed collective with which processes are silent or have ended, and where they are."""
        time.sleep((_MISSED + 1) * self._every_s)
        now = time.monotonic()
        said = []
        for rank, heard in sorted(self._heard.items()):
            silent_s = now - heard.at
            if heard.word == _ENDED:
                said.append(f"rank {rank} has ended")
            elif silent_s > _MISSED * self._every_s and heard.word != _LEFT:
                said.append(f"{_named(rank, heard.word)} has been silent for {silent_s:.0f} s")
                _continue(heard.word)
            elif heard.word != _LEFT:
                said.append(f"{_named(rank, heard.word)} runs")
        return CommunicationFailed(f"{problem} Of the others, {'; '.join(said)}.") if said else problem

    def _run(self) -> None:
        beat = 0
        looked = time.monotonic()
        while not self._over.wait(self._every_s):
            beat += 1
            now = time.monotonic()
            if now - looked > self._silence_s / 2:  # this process itself was stopped, and perhaps all of them
                self._heard.clear()
            looked = now
            try:
                self._say(beat)
                self._listen()
                problem = self._problem(time.monotonic())
            except RuntimeError as error:
                problem = CommunicationFailed(
                    f"the rendezvous does not answer ({first_line(error)}): the process that holds it, rank 0 or the "
                    f"launcher, has ended or was stopped, so the run ends. Go on with --resume auto."
                )
            if problem is not None and not self._over.wait(_OTHERS_ERROR_S):
                for heard in self._heard.values():
                    if heard.word not in (_LEFT, _ENDED) and time.monotonic() - heard.at > self._silence_s:
                        _continue(heard.word)
                self._give_up(problem)
                return

    def _say(self, beat: int) -> None:
        word = f"{beat}|{os.getpid()}|{socket.gethostname()}|{self._whereabouts.text}"
        self._store.set(self._key(self._rank), word)

    def _listen(self) -> None:
        now = time.monotonic()
        for rank in self._others:
            word = self._store.get(self._key(rank)).decode()
            if rank not in self._heard or self._heard[rank].word != word:
                self._heard[rank] = _Heard(word, now)

    def _problem(self, now: float) -> CommunicationFailed | None:
        for rank, heard in self._heard.items():
            if heard.word == _ENDED:
                return CommunicationFailed(f"rank {rank} has ended, so this one ends, too. See what that one printed.")
            if heard.word != _LEFT and now - heard.at > self._silence_s:
                return CommunicationFailed(
                    f"{_named(rank, heard.word)} has said nothing for {now - heard.at:.0f} s: it was stopped, or its "
                    f"node is cut off, so the run ends. Go on from the last checkpoint with --resume auto; "
                    f"--dist-timeout is how long to wait."
                )
        return None

    @staticmethod
    def _key(rank: int) -> str:
        return f"roll-call/{rank}"


def _continue(word: str) -> None:
    """Wake a process of this node that was stopped: it finds the others gone, and ends.

    One that is stopped obeys SIGKILL alone, which torchrun and our launcher send only when they have waited 30 s.
    """
    _, pid, host, _ = word.split("|", 3)
    if host == socket.gethostname() and int(pid) != os.getpid() and hasattr(signal, "SIGCONT"):
        with suppress(OSError):
            os.kill(int(pid), signal.SIGCONT)


def _named(rank: int, word: str) -> str:
    _, pid, host, where = word.split("|", 3)
    return f"rank {rank} (process {pid} on {host}{f', {where}' if where else ''})"
