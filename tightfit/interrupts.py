"""Let interrupts wait until a model that is measured or tried has been put back.

A signal's handler runs between any two bytecodes: in the middle of what puts a model back, between a context's entry
and what guards it, or in a finalizer, where Python drops the exception that it raises.  Inside `waiting_interrupts`, a
signal is noted, and its handler runs at the next `safe_point`: between forward, backward and optimizer, between two
operations that are timed, between rounds of the solver.  What it raises there is like any exception of the step.  A
second signal does not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from types import FrameType, TracebackType
from typing import Any

#: What people and test runners interrupt with. Not those of sampling profilers, whose handlers raise nothing.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGBREAK")
_NUMBERS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], Any]

_pending: list[int] = []
_handlers: dict[int, Handler] = {}
_depth = 0
_raised: list[BaseException] = []
"""What a handler has raised; it is to reach who called the outermost such context."""


class waiting_interrupts(ContextDecorator):  # noqa: N801  # used as a statement, like torch.no_grad
    """Let the signals that Python code handles wait for a `safe_point`, or for the end of the outermost such context.

    In other threads than the main one, where no handler runs, this does nothing.
    """

    def __enter__(self) -> None:
        global _depth
        self._counts = threading.current_thread() is threading.main_thread()
        if not self._counts:
            return
        if _depth == 0:
            try:
                for number in _NUMBERS:
                    handler = signal.getsignal(number)
                    if callable(handler):  # not one of C code, nor the system's own
                        _handlers[number] = handler
                        signal.signal(number, _note)
            except BaseException:
                _give_back()
                raise
        _depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _depth
        if not self._counts:
            return
        _depth -= 1
        if _depth == 0:
            _raised.clear()
            handlers = dict(_handlers)
            _give_back()
            _deliver(handlers)

    def _recreate_cm(self) -> waiting_interrupts:
        return waiting_interrupts()  # a decorated function may call itself, or run in several threads


def safe_point() -> None:
    """Run the handlers of signals that wait; they may raise. Call it where an exception does no harm."""
    if _pending and threading.current_thread() is threading.main_thread():
        _deliver(_handlers)


def is_of_a_handler(error: BaseException) -> bool:
    """Tell whether a signal's handler raised this, or what it was raised from."""
    link: BaseException | None = error
    while link is not None:
        if any(link is one for one in _raised):
            return True
        link = link.__cause__ or link.__context__
    return False


def pass_on(error: Exception) -> None:
    """Raise what a signal's handler raised, for who would make do without what failed with `error`."""
    if is_of_a_handler(error):
        raise error


def _note(number: int, frame: FrameType | None) -> None:
    if number in _pending:
        _pending.remove(number)
        _handlers[number](number, frame)
    else:
        _pending.append(number)


def _deliver(handlers: dict[int, Handler]) -> None:
    while _pending:
        number = _pending.pop(0)
        try:
            handlers[number](number, None)
        except BaseException as error:
            if _depth:
                _raised.append(error)
            raise


def _give_back() -> None:
    """Put the handlers back, unless somebody has put others there meanwhile."""
    try:
        while _handlers:
            number = next(iter(_handlers))
            if signal.getsignal(number) is _note:
                signal.signal(number, _handlers[number])
            del _handlers[number]
    except BaseException:  # of a handler that is back already
        _give_back()
        raise
