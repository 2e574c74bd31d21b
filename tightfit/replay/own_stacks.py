"""Put a session's dispatch mode, hooks and watch on PyTorch's stacks, and take them off again.

Calls of functions and transforms are watched as long: no other call pays for that.

PyTorch's stacks are last in, first out, and user code may push modes or hooks of its own between two of our calls.
`OwnStacks.switch` therefore changes them only if whatever lies beneath ours is what lay there when the calling region
began; otherwise it leaves them and lets operations pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tightfit._torch_private.autograd import saved_tensor_hooks_allowed, top_saved_tensor_hooks
from tightfit._torch_private.dispatch import (
    DispatchMode,
    dispatch_depth,
    function_mode_depth,
    top_dispatch_mode,
    top_function_mode,
)
from tightfit.operators.escaped_memory import MemoryWatch
from tightfit.operators.function_calls import WatchedFunctions
from tightfit.operators.function_transforms import WatchedTransforms


class OwnStacks:
    """What one session puts on the stacks: a dispatch mode, saved-tensor hooks, and a watch of handed-out memory."""

    def __init__(
        self,
        mode: DispatchMode,
        pack: Callable[[torch.Tensor], Any],
        unpack: Callable[[Any], torch.Tensor],
        watch: MemoryWatch | None,
        calls: Sequence[WatchedFunctions | WatchedTransforms],
    ) -> None:
        self.active = False
        """Whether they are on the stacks."""
        self.hooks_are_aside = False
        """Whether the hooks are off, in a function's forward."""
        self._mode = mode
        self._pack = pack
        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        self._watch = watch
        self._calls = calls

    def has_foreign_hooks(self) -> bool:
        """Return whether somebody else's saved-tensor hooks are active, or such hooks forbidden (`torch.func.grad`).

        `torch.utils.checkpoint` counts what is saved under its hooks, in forward and again when it recomputes: a region
        that took some of it away in one of the two would make it confuse tensors.  Measuring sees nothing saved
        there, either, so a plan drops nothing.
        """
        hooks = top_saved_tensor_hooks()
        return not saved_tensor_hooks_allowed() or (hooks is not None and not self._are_ours(hooks))

    def beneath(self) -> object:
        """Return what lies on PyTorch's stacks beneath our own mode and hooks; None if ours are not on top."""
        if not self.active:
            return dispatch_depth(), top_saved_tensor_hooks(), function_mode_depth()
        if not self._are_on_top():
            return None
        self._pop()
        below = dispatch_depth(), top_saved_tensor_hooks(), function_mode_depth()
        self._push()
        return below

    def switch(self, active: bool) -> None:
        """Put ours on the stacks or take them off, unless something of others lies on top of them."""
        if active == self.active:
            return
        if active:
            self._push()
            for calls in self._calls:
                calls.start()
        elif self._are_on_top():
            self._pop()
            self.stop_watching()

    def stop_watching(self) -> None:
        """Leave calls of functions and transforms alone."""
        for calls in self._calls:
            calls.stop()

    @contextmanager
    def hooks_aside(self) -> Iterator[None]:
        """Take our hooks off inside a function's forward: the graph around it saves nothing there.

        `torch.func`, which forbids hooks, may be in it.  What a graph inside saves is the call's own matter.
        """
        on_top = self.active and self._are_ours(top_saved_tensor_hooks())
        if on_top:
            self._hooks.__exit__()
            self.hooks_are_aside = True
        try:
            yield
        finally:
            if on_top:
                self._hooks.__enter__()
                self.hooks_are_aside = False

    def _are_ours(self, hooks: object) -> bool:
        return isinstance(hooks, tuple) and hooks[0] is self._pack

    def _are_on_top(self) -> bool:
        return (
            top_dispatch_mode() is self._mode
            and self._are_ours(top_saved_tensor_hooks())
            and (self._watch is None or top_function_mode() is self._watch)
        )

    def _push(self) -> None:
        self._hooks.__enter__()
        self._mode.activate()
        if self._watch is not None:
            self._watch.activate()
        self.active = True

    def _pop(self) -> None:
        if self._watch is not None:
            self._watch.deactivate()
        self._mode.deactivate()
        self._hooks.__exit__(None, None, None)
        self.active = False
