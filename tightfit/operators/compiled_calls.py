"""Run what `torch.compile` made, inside a model that is observed or planned, as it runs without us.

A compiled callable runs compiled beneath our dispatch modes, which say so (`DispatchMode.ignore_compile_internals`).
Function modes it would trace, and run eagerly what it cannot trace, so the watch of handed-out memory is taken off for
the time of such a call.  What it computes with gradients shows as an `autograd.Function`: an opaque call like others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from tightfit._torch_private.compiling import hook_compiled_calls
from tightfit._torch_private.dispatch import top_function_mode
from tightfit.operators.escaped_memory import MemoryWatch

_taking_part: dict[int, list[CompiledCalls]] = {}  # by thread
_lock = threading.Lock()


class RunsWithoutData(RuntimeError):
    """A compiled callable was called with tensors that have no data, of which its code would take the addresses."""


class CompiledCalls:
    """Lets compiled callables run compiled in this thread, from `start` to `stop`; without data, refuses them."""

    def __init__(self, *, has_data: bool = True) -> None:
        self.has_data = has_data
        self.seen = False
        """Whether a compiled callable was called."""
        self._thread = 0

    def start(self) -> None:
        """Begin to take part."""
        with _lock:
            self._thread = threading.get_ident()
            if not _taking_part:
                hook_compiled_calls(_enter)
            _taking_part.setdefault(self._thread, []).append(self)

    def stop(self) -> None:
        """Leave compiled callables alone."""
        with _lock:
            others = _taking_part[self._thread]
            others.remove(self)
            if not others:
                del _taking_part[self._thread]
            if not _taking_part:
                hook_compiled_calls(None)


def _enter() -> Callable[[], Any]:
    taking_part = _taking_part.get(threading.get_ident(), ())
    for one in taking_part:
        one.seen = True
        if not one.has_data:
            raise RunsWithoutData("a callable that torch.compile made was called with tensors without data")
    if not taking_part:
        return _nothing
    watch = _own(top_function_mode())
    if watch is None:
        return _leave
    watch.deactivate()
    return partial(_leave, watch)


def _leave(watch: MemoryWatch | None = None) -> None:
    """End a compiled call, which only afterwards puts back the dispatch keys that it found, whatever it has changed."""
    if watch is not None:
        watch.activate()
    else:
        watch = _own(top_function_mode())
    if watch is not None:
        watch.is_behind = True


def _own(mode: object) -> MemoryWatch | None:
    return mode if isinstance(mode, MemoryWatch) else None


def _nothing() -> None:
    pass
