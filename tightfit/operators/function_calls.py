"""Watch where `autograd.Function`s are called in a thread.

Users keep ``MyFunction.apply`` in variables, so that replacing it would come too late.  But PyTorch asks the class for
``forward`` at every call, and the class of all such classes can answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.autograd import node_class_of
from tightfit._torch_private.compiling import COMPILED_GRAPHS, never_compiled
from tightfit.operators.stashed_tensors import stashed_in

#: Makes a call of a function's ``forward``: given the function's class, that forward, and its arguments.
Watcher = Callable[[Any, Callable[..., Any], tuple[Any, ...]], Any]

#: Where functions are defined that run whole modules, or operators of `torch.library`, which are operations themselves.
_OTHERWISE_RECORDED = frozenset({"torch.utils.checkpoint", "torch._library.autograd"})

_Kind: Any = type(torch.autograd.Function)
_watchers: dict[int, Watcher] = {}  # by thread
_lock = threading.Lock()


@never_compiled
def _getattribute(function: Any, name: str) -> Any:
    found = type.__getattribute__(function, name)
    watcher = _watchers.get(threading.get_ident()) if name == "forward" else None
    if watcher is None:
        return found

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs:  # not by PyTorch, which calls it with positions alone
            return found(*args, **kwargs)
        return watcher(function, found, args)

    forward.__wrapped__ = found  # type: ignore[attr-defined]  # PyTorch reads the defaults of its arguments
    return forward


class WatchedFunctions:
    """Lets a watcher make the calls of functions in this thread, from `start` to `stop`; the latest one does."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._before: Watcher | None = None
        self._thread = 0
        self._is_on = False

    def start(self) -> None:
        """Begin to watch."""
        with _lock:
            self._thread = threading.get_ident()
            self._before = _watchers.get(self._thread)
            if not _watchers:
                _Kind.__getattribute__ = _getattribute
            _watchers[self._thread] = self._watcher
            self._is_on = True

    def stop(self) -> None:
        """Leave calls to whoever watched before; nothing if it was not begun."""
        with _lock:
            if not self._is_on:
                return
            self._is_on = False
            if self._before is not None:
                _watchers[self._thread] = self._before
            else:
                _watchers.pop(self._thread, None)
                if not _watchers:
                    del _Kind.__getattribute__


def arguments_of(function: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Split what a ``forward`` is called with into its ``ctx``, None if it takes none, and the call's arguments."""
    if args and isinstance(args[0], node_class_of(function)):
        return args[0], args[1:]
    return None, args


def can_be_made_again(function: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether calling the function's ``apply`` would make the same call: it is PyTorch that calls its forward, and
    not somebody with a context of his own; and it is not one that runs whole modules.
    """
    takes_context = function.setup_context is torch.autograd.Function.setup_context
    if takes_context and arguments_of(function, args)[0] is None:
        return False
    return function.__module__ not in _OTHERWISE_RECORDED


def is_compiled_graph(function: Any) -> bool:
    """Tell whether a function is a graph that `torch.compile` made."""
    return bool(function.__module__ == COMPILED_GRAPHS)


def saved_by(context: Any) -> list[torch.Tensor]:
    """List what a ``forward`` that has ended has asked autograd to save, and what it keeps in its context; nothing
    where no gradient is wanted.
    """
    if context is None or not any(context.needs_input_grad):
        return []
    return [*(tensor for tensor in context.to_save or () if tensor is not None), *stashed_in(context)]
