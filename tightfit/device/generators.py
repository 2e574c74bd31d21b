"""Let a random generator draw the same numbers again."""

from __future__ import annotations

import threading

import torch

from tightfit.device.registry import device_for

#: Held while what belongs to the process (generators, libraries' switches, a module's state) is as it was for a call:
#: of two backwards in two threads, one waits.
AS_IT_WAS = threading.RLock()


class drawing_from:  # noqa: N801  # used as a statement, like torch.no_grad
    """Let a generator draw from `state` inside the context, and afterwards from where it was.

    Another thread that wants the same waits. A plain class for speed: it is entered at every replay of a random
    operation.
    """

    __slots__ = ("_generator", "_now", "_state", "_through")

    def __init__(self, generator: torch.Generator, state: torch.Tensor) -> None:
        self._generator = generator
        self._state = state

    def __enter__(self) -> None:
        AS_IT_WAS.acquire()
        try:
            self._through = device_for(self._generator.device).sets_state_of(self._generator)
            self._now = self._through.get_state()
            self._through.set_state(self._state)
        except BaseException:
            AS_IT_WAS.release()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._through.set_state(self._now)
        finally:
            AS_IT_WAS.release()
