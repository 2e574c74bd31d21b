"""Meet the calls of `torch.utils.checkpoint` that a model makes by itself.

PyTorch's `checkpoint` looks its two forms up in its own module, by private names.  While somebody takes calls over
(`taking_over`), these names lead here; the calls of other threads, and those that are not taken, go on to PyTorch.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import checkpoint as pytorch

from tightfit._torch_private.dispatch import tree_map


@dataclass(frozen=True, slots=True)
class CheckpointCall:
    """A call of `torch.utils.checkpoint.checkpoint`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_reentrant: bool
    preserves_random_state: bool
    has_own_context: bool = False
    """Runs in contexts of its caller's, other than those that choose what is recomputed."""
    is_debugged: bool = False


#: Says how to run the function of a call: plainly, inside this context; None leaves the call to PyTorch.
Taker = Callable[[CheckpointCall], AbstractContextManager[object] | None]


class _Taking:
    """Who takes the calls of a thread over."""

    def __init__(self, taker: Taker) -> None:
        self.taker = taker
        self.calls_left_alone = 0  # that are open: what they call is made again in backward, where nobody takes over

    def context_for(self, call: CheckpointCall) -> AbstractContextManager[object] | None:
        if self.calls_left_alone or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self.taker(call)

    @contextmanager
    def leaving_alone(self) -> Iterator[None]:
        self.calls_left_alone += 1
        try:
            yield
        finally:
            self.calls_left_alone -= 1


_lock = threading.Lock()
_by_thread: dict[int, _Taking] = {}


@contextmanager
def taking_over(taker: Taker) -> Iterator[None]:
    """Let `taker` decide, inside, about each call of `checkpoint` that this thread makes with gradients enabled."""
    thread = threading.get_ident()
    with _lock:
        before = _by_thread.get(thread)
        _by_thread[thread] = _Taking(taker)
        setattr(pytorch, _GENERATOR, _without_reentrant)
        pytorch.CheckpointFunction = _Reentrant  # type: ignore[assignment,misc]  # has the one method that is called
    try:
        yield
    finally:
        with _lock:
            if before is not None:
                _by_thread[thread] = before
            else:
                del _by_thread[thread]
            if not _by_thread:
                setattr(pytorch, _GENERATOR, _PYTORCHS_GENERATOR)
                pytorch.CheckpointFunction = _PYTORCHS_FUNCTION  # type: ignore[misc]  # a class is put back


#: Named so up to PyTorch 2.13, and since.
_GENERATOR = "_checkpoint_without_reentrant_generator"
if hasattr(pytorch, f"{_GENERATOR}_impl"):
    _GENERATOR += "_impl"
_PYTORCHS_GENERATOR: Any = getattr(pytorch, _GENERATOR)
_SIGNATURE = inspect.signature(_PYTORCHS_GENERATOR)
_PYTORCHS_FUNCTION = pytorch.CheckpointFunction

#: Contexts that choose, operation by operation, what is recomputed, and change nothing else.
_SELECTIVE = (pytorch._CachingTorchDispatchMode, pytorch._CachedTorchDispatchMode)


def _without_reentrant(*given: Any, **named: Any) -> Iterator[None]:
    """Go before and after the function, as PyTorch's generator does."""
    taking = _by_thread.get(threading.get_ident())
    bound = _SIGNATURE.bind(*given, **named)
    context = None
    if taking is not None:
        bound.apply_defaults()
        context = taking.context_for(_call_of(bound.arguments))
    own = _PYTORCHS_GENERATOR(*bound.args, **bound.kwargs)
    if taking is None:
        yield from own
    elif context is None:
        with taking.leaving_alone():
            yield from own
    else:
        own.close()
        with context:
            yield


def _call_of(arguments: dict[str, Any]) -> CheckpointCall:
    """Return the call of which PyTorch's generator has these arguments; its context is asked for, once."""
    has_own_context = False
    if arguments["context_fn"] is not pytorch.noop_context_fn:
        contexts = arguments["context_fn"]()
        has_own_context = not all(isinstance(one, _SELECTIVE) for one in contexts)
        arguments["context_fn"] = lambda: contexts
    switch = pytorch._checkpoint_debug_enabled
    return CheckpointCall(
        function=arguments["function" if "function" in arguments else "fn"],
        args=tuple(arguments["args"]),
        kwargs=dict(arguments["kwargs"]),
        is_reentrant=False,
        preserves_random_state=arguments["preserve_rng_state"],
        has_own_context=has_own_context,
        is_debugged=arguments["debug"] if switch is None else switch,
    )


class _Reentrant:
    """Stands for PyTorch's `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Run the function, as `CheckpointFunction.apply` does."""
        taking = _by_thread.get(threading.get_ident())
        if taking is None:
            return _PYTORCHS_FUNCTION.apply(function, preserve_rng_state, *args)
        context = taking.context_for(CheckpointCall(function, args, {}, True, preserve_rng_state))
        if context is None:
            with taking.leaving_alone():
                return _PYTORCHS_FUNCTION.apply(function, preserve_rng_state, *args)
        with context:
            # Backward goes through them in the other order, as PyTorch's node hands out the arguments' gradients: that
            # decides about the sum where one tensor is given twice.
            summed = [_summed_first(arg) for arg in reversed(args)]
            return _detached_below_top(function(*reversed(summed)))


def _summed_first(argument: Any) -> Any:
    """Return an argument whose gradients from inside the function are summed before others are added to them.

    So does PyTorch's form, whose backward is one node: the order of additions decides the last bits.
    """
    differentiable = isinstance(argument, torch.Tensor) and argument.requires_grad
    return argument.view_as(argument) if differentiable else argument


def _detached_below_top(result: Any) -> Any:
    """Return a result in which only tensors at the top have gradients, as of an `autograd.Function`."""
    if isinstance(result, torch.Tensor):
        return result
    if type(result) is tuple:
        return tuple(one if isinstance(one, torch.Tensor) else _detached_below_top(one) for one in result)
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, result)
