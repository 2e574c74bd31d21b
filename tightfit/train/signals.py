"""Signals during training: finish the step, save a checkpoint, end with the signal's exit code; by a second, at once.

SIGINT and SIGTERM; SIGHUP, of a terminal that is gone, unless it is ignored as under nohup; SIGUSR1, by which Slurm
warns before a job's time is up (``--signal``).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")

#: Several processes ask each other about so often whether one got a signal, and after so many steps at the latest.
_ASK_EVERY_MS = 200.0
_ASK_EVERY_STEPS = 50
#: What comes so soon after the first signal is the same one, by another way: from the terminal and from the launcher.
_SAME_S = 0.2
_ENDED_AT_ONCE = b"tightfit: a second signal: ended at once; the checkpoints written before are complete\n"


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a run in good order: those that this system has, and that are not ignored."""
    known = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


_wake_ups: list[int] = []
"""Descriptors through which signals that arrive are told to a thread; one at most."""


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was written."""

    def __init__(self, signal_number: int, message: str) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)


class StopRequest:
    """Notes the first signal that ends runs while entered, instead of ending the process; a second one does so at once.

    Handlers wait for the main thread, which may itself wait in a collective or in a long operation; so a thread of its
    own looks out for the second signal.  Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self._group = group
        self._signal_number: int | None = None
        self._ask_every = 1
        self._previous: dict[int, Any] = {}
        self._wake_up = -1

    def after_step(self, step: int) -> int | None:
        """Return the signal that this process or another of the group got; all learn of it after the same step."""
        if self._group.is_single_process:
            return self._signal_number
        if step % self._ask_every:
            return None
        return max(self._group.all_gather(self._signal_number or 0)) or None

    def expect_steps_of(self, step_ms: float) -> None:
        """Ask the other processes as often as fits steps of this duration, which must be equal in all of them."""
        self._ask_every = max(1, min(_ASK_EVERY_STEPS, int(_ASK_EVERY_MS / max(step_ms, 1e-3))))

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._previous = {number: signal.signal(number, self._note) for number in ending_signals()}
        arrived, self._wake_up = os.pipe()
        os.set_blocking(self._wake_up, False)
        others = signal.set_wakeup_fd(self._wake_up, warn_on_full_buffer=False)
        if others != -1:  # an event loop's: it needs them more
            signal.set_wakeup_fd(others)
        _wake_ups.append(self._wake_up)
        threading.Thread(target=_end_by_second, args=(arrived, set(self._previous)), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._wake_up == -1:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._wake_up not in _wake_ups:  # a fork
            return
        now = signal.set_wakeup_fd(-1)
        if now != self._wake_up:
            signal.set_wakeup_fd(now)
        _wake_ups.remove(self._wake_up)
        os.close(self._wake_up)  # ends the thread
        self._wake_up = -1

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal_number = self._signal_number or number


def _forget_in_fork() -> None:
    """Keep what a worker process gets, which has these handlers from its fork, from being taken for this one's."""
    if _wake_ups:
        signal.set_wakeup_fd(-1)
        os.close(_wake_ups.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_fork)


def _end_by_second(arrived: int, ending: set[int]) -> None:
    """Read the signals that the interpreter gets, and end the process by the second that is to end it."""
    first: float | None = None
    with os.fdopen(arrived, "rb", buffering=0) as numbers:
        while byte := numbers.read(1):
            if byte[0] not in ending:
                continue
            now = time.monotonic()
            if first is None:
                first = now
            elif now - first > _SAME_S:
                with suppress(OSError):  # the terminal may be what is gone
                    os.write(2, _ENDED_AT_ONCE)
                os._exit(128 + byte[0])
