"""Say how far measuring, solving and proving are, to whoever shows it.

The engine calls `progress` at points where it calls `safe_point`, too; without a listener that costs next to nothing.
It is lowest of all, so that every floor can say it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

#: Called with a phase, for people, and how many of how many things in it are done; of 0: nobody knows.
Listener = Callable[[str, int, int], None]

#: Seconds after which a line is shown where nobody else listens, and how often it is drawn anew.
_LONG_S = 3.0
_EVERY_S = 0.5

_listener: ContextVar[Listener | None] = ContextVar("_listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Call `listener` for all that is said inside the context, in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def progress(phase: str, done: int = 0, total: int = 0) -> None:
    """Say that `done` of `total` things of a phase are done."""
    listener = _listener.get()
    if listener is not None:
        listener(phase, done, total)


@contextmanager
def showing_when_long(after_s: float = _LONG_S, stream: TextIO | None = None) -> Iterator[None]:
    """Show a line in the terminal once what runs inside has taken so long, unless somebody listens; it does not stay.

    The line is drawn by whoever says something: a thread of its own would disturb what is timed.

    Args:
        after_s: seconds.
        stream: where the line is shown; by default standard error, of one process of several.
    """
    out = sys.stderr if stream is None else stream
    is_first = os.environ.get("RANK", "0") == "0"
    if _listener.get() is not None or out is None or not (is_first and out.isatty()):
        yield
        return
    began_s = time.monotonic()
    drawn_s = began_s + after_s - _EVERY_S
    is_shown = False

    def listen(phase: str, done: int, total: int) -> None:
        nonlocal drawn_s, is_shown
        now_s = time.monotonic()
        if now_s - drawn_s >= _EVERY_S:
            count = f", {done:,} of {total:,}" if total else ""
            out.write(f"\r\x1b[2Ktightfit: {phase}{count} ({now_s - began_s:.0f} s so far)")
            out.flush()
            drawn_s, is_shown = now_s, True

    try:
        with heard_by(listen):
            yield
    finally:
        if is_shown:
            out.write("\r\x1b[2K")
            out.flush()
