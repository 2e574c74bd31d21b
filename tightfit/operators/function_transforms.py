"""Notice where a transform of `torch.func` begins (grad, vjp, jacrev, hessian) in a thread that records.

These forbid saved-tensor hooks inside, and are an error where some are active, as ours are around a recorded loss.  All
of them open `torch.autograd.graph.disable_saved_tensors_hooks` first, which is looked up at each call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_plain = torch.autograd.graph.disable_saved_tensors_hooks
_told: dict[int, list[Callable[[], None]]] = {}  # by thread
_lock = threading.Lock()


def _tell_and_disable(error_message: str) -> Any:
    if told := _told.get(threading.get_ident()):
        told[-1]()
    return _plain(error_message)


class WatchedTransforms:
    """Tells of each transform that begins in this thread, from `start` to `stop`; the latest one is told."""

    def __init__(self, begins: Callable[[], None]) -> None:
        self._begins = begins
        self._thread = 0
        self._is_on = False

    def start(self) -> None:
        """Begin to watch."""
        with _lock:
            self._thread = threading.get_ident()
            if not _told:
                torch.autograd.graph.disable_saved_tensors_hooks = _tell_and_disable
            _told.setdefault(self._thread, []).append(self._begins)
            self._is_on = True

    def stop(self) -> None:
        """Leave transforms alone; nothing if it was not begun."""
        with _lock:
            if not self._is_on:
                return
            self._is_on = False
            others = _told[self._thread]
            others.remove(self._begins)
            if not others:
                del _told[self._thread]
            if not _told:
                torch.autograd.graph.disable_saved_tensors_hooks = _plain
