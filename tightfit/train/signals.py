"""Signals during training: finish the step, save a checkpoint, then end with the signal's exit code.

SIGINT and SIGTERM; SIGHUP, of a terminal that is gone, unless it is ignored as under nohup; SIGUSR1, by which Slurm
warns before a job's time is up (``--signal``).
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")

#: Several processes ask each other about so often whether one got a signal, and after so many steps at the latest.
_ASK_EVERY_MS = 200.0
_ASK_EVERY_STEPS = 50


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a run in good order: those that this system has, and that are not ignored."""
    known = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was written."""

    def __init__(self, signal_number: int, message: str) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)


class StopRequest:
    """Notes the first signal that ends runs while entered, instead of ending the process; a second one acts as ever.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self._group = group
        self._signal_number: int | None = None
        self._ask_every = 1
        self._previous: dict[int, Any] = {}

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
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in ending_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
