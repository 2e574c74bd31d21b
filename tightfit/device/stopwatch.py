"""Time what a thread does, and notice that others kept the processor from it meanwhile."""

from __future__ import annotations

import time

#: A thread that runs undisturbed takes hardly more time than the processor spends on it.
_MOST_RATIO = 1.25
_ALWAYS_SECONDS = 50e-6


class Stopwatch:
    """Counts from when it is made, in the thread that makes it."""

    __slots__ = ("_processor_seconds", "_seconds")

    def __init__(self) -> None:
        self._processor_seconds = time.thread_time()
        self._seconds = time.perf_counter()

    def read(self) -> tuple[float, bool]:
        """Return milliseconds, and whether the thread was disturbed.

        A thread that was disturbed had to wait, for the processor or for others that it works with; then only the time
        counts in which it ran.
        """
        seconds = time.perf_counter() - self._seconds
        ran_seconds = time.thread_time() - self._processor_seconds
        # Where the second clock is a coarse one, it may not have moved.
        is_disturbed = 0 < ran_seconds < (seconds - _ALWAYS_SECONDS) / _MOST_RATIO
        return (ran_seconds if is_disturbed else seconds) * 1e3, is_disturbed
