"""Compiled and traced code."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

_DYNAMO = "torch._dynamo.eval_frame"


def hook_compiled_calls(enter: Callable[[], Callable[[], Any]] | None) -> None:
    """Have `enter` called at the start of each call of what `torch.compile` made, and at its end what that returned.

    Each such callable has a list of what to call then; it is read through here. None ends that.
    """
    dynamo = sys.modules.get(_DYNAMO)
    if dynamo is None:
        return
    kind, name = dynamo._TorchDynamoContext, "enter_exit_hooks"
    if enter is None:
        if name in vars(kind):
            delattr(kind, name)
        return

    def read(context: Any) -> Any:
        return _Hooks(enter, vars(context)[name])

    def write(context: Any, hooks: Any) -> None:
        vars(context)[name] = hooks

    setattr(kind, name, property(read, write))


class _Hooks:
    """A compiled callable's hooks, and one more in front."""

    def __init__(self, first: Callable[[], Any], hooks: list[Callable[[], Any]]) -> None:
        self._first = first
        self._hooks = hooks
        self.append = hooks.append

    def __iter__(self) -> Iterator[Callable[[], Any]]:
        yield self._first
        yield from self._hooks


#: Where the functions are defined by which compiled graphs run forward and backward.
COMPILED_GRAPHS = "torch._functorch._aot_autograd.runtime_wrappers"


Function = TypeVar("Function", bound=Callable[..., Any])


def never_compiled(function: Function) -> Function:
    """Keep `torch.compile` out of a function and of all that it calls, at no cost to its calls.

    Beneath a dispatch mode a compiled callable runs eagerly, with the compiler still looking at every frame: it would
    compile the mode's own code, hundreds of frames, with objects made past their ``__init__``.
    `torch.compiler.disable` does the same by a wrapper, which each operation would pay for.
    """
    compiler = torch._C._dynamo.eval_frame
    skip = compiler._FrameAction.SKIP
    code: Any = getattr(function, "__code__")  # noqa: B009  # callables in general have none
    compiler.set_code_exec_strategy(code, compiler._FrameExecStrategy(skip, skip))
    return function


def not_traced(reason: str) -> Callable[[Function], Function]:
    """Have what `torch.compile` traces break where a function is called, which runs eagerly with all that it calls.

    As `torch.compiler.disable` does by a wrapper, which each call would pay for.  Where the compiler may not break, its
    error gives the reason.
    """

    def mark(function: Function) -> Function:
        marked: Any = never_compiled(function)
        marked._torchdynamo_disable = True
        marked._torchdynamo_disable_msg = reason
        return function

    return mark


_COMPILED_CALL = "_TorchDynamoContext.__call__"


def is_call_of_compiled(code: types.CodeType) -> bool:
    """Tell whether code calls what `torch.compile` made of a function."""
    return code.co_qualname.startswith(_COMPILED_CALL) and code.co_filename.endswith("eval_frame.py")


def is_traced() -> bool:
    """Tell whether `torch.jit.trace` records what runs now."""
    return torch._C._is_tracing()
