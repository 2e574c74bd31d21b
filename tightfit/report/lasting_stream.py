"""A stream whose loss ends nothing: a run is worth more than the lines that it prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


class LastingStream:
    """Writes to a stream as long as that takes anything, and then to nothing.

    Its reader may have ended (``| head``, a terminal's multiplexer that was killed), its disk may be full.
    """

    def __init__(self, stream: TextIO | None, when_lost: Callable[[str], object]) -> None:
        """`when_lost` is told why, once; no stream, as of a process begun with its output closed, is none to lose."""
        self._stream = stream
        self._when_lost = when_lost

    def write(self, text: str) -> int:
        """Write, or do nothing."""
        self._try(lambda stream: _write(stream, text))
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Tell whether it is still a terminal."""
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not yet made, or copied
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _try(self, work: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            work(self._stream)
        except (OSError, ValueError) as problem:  # ValueError: it was closed
            lost, self._stream = self._stream, None
            discard(lost)
            self._when_lost(getattr(problem, "strerror", None) or str(problem))


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:  # a terminal of another alphabet
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, errors="backslashreplace").decode(encoding))


def discard(stream: TextIO) -> None:
    """Let all that is or will be written to a stream that takes nothing go nowhere; its end would raise again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
