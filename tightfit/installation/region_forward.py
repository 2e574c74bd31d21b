"""The forward that is installed on a region's module, which looks like the module's own to everybody who asks.

Libraries decide by what they see: transformers' ``generate`` makes an attention mask only for a forward that takes one,
its ``Trainer`` drops the columns that forward has no argument for.  So signature, names, documentation, annotations,
``__self__`` and ``__code__`` are the original's, and ``__wrapped__`` leads there.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.compiling import is_traced, not_traced
from tightfit._torch_private.dispatch import is_transformed
from tightfit._torch_private.modules import is_compiled_in_place
from tightfit.replay.executors import RegionCall
from tightfit.replay.installed import Installed

#: Of a method's own attributes, those that `functools.update_wrapper` does not copy.
_OF_A_METHOD = frozenset({"__self__", "__code__", "__globals__", "__defaults__", "__kwdefaults__", "__closure__"})


WHY_NOT_TRACED = (
    "tightfit has planned this model, and what a plan recomputes is decided while it runs. Compile blocks before fit "
    "(block.compile()), or call applied.remove() first"
)
#: Weakly, as a forward holds its module, which would else never die.
_forwards: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[RegionForward]] = weakref.WeakKeyDictionary()


def is_planned(module: torch.nn.Module) -> bool:
    """Tell whether a plan's forward is installed on a module, whatever others have wrapped around it."""
    found = _forwards.get(module)
    forward = found() if found is not None else None
    return forward is not None and forward.is_attached


class RegionForward:
    """The forward of a region module: runs the module's own forward inside the plan's session."""

    original: Callable[..., Any]
    """The module's own forward."""

    def __init__(self, module: torch.nn.Module, path: str, installed: Installed) -> None:
        original = module.forward
        functools.update_wrapper(self, original)
        self.had_own = "forward" in vars(module)
        self.original = original
        self._module = module
        self._path = path
        self._installed = installed
        self.is_attached = True
        """Off: the plan was uninstalled, but somebody's wrapper still calls this."""
        _forwards[module] = weakref.ref(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        if args and args[0] is self._module:  # somebody bound it once more, as accelerate does when it unwraps
            args = args[1:]
        return self.run_planned(args, kwargs) if self._is_planned_now() else self.run_plain(args, kwargs)

    def run_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's forward as if nothing were installed: without gradients, paused, exported or traced."""
        return self.original(*args, **kwargs)

    @not_traced(WHY_NOT_TRACED)
    def run_planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's forward under its plan; recorded or transformed, as if nothing were installed."""
        if is_traced():
            return self.run_plain(args, kwargs)
        if is_transformed():
            if self._installed.listener is not None:
                self._installed.listener.hooks_around(self._path)
            return self.original(*args, **kwargs)
        if is_compiled_in_place(self._module) and self._installed.listener is not None:
            self._installed.listener.compiled()
        call = RegionCall(self._module, self.original, args, kwargs, self._installed.statistics)
        return self._installed.run(self._path, call)

    def _is_planned_now(self) -> bool:
        """Return whether this call may follow a plan; a compiler may have to trace this."""
        return (
            torch.is_grad_enabled()
            and self.is_attached
            and self._installed.enabled
            and not torch.compiler.is_exporting()
        )

    def __getattr__(self, name: str) -> Any:
        """Return what the original has: attributes of a method, and those that somebody gave it."""
        dunder = name.startswith("__")
        if name == "original" or (dunder and name not in _OF_A_METHOD and name != "__func__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.original, name)
        return _RegionFunction(self, found) if name == "__func__" else found

    # A copied or unpickled model is unplanned and uses its own weights: what is copied is the forward that was there
    # before, bound to the copy.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.had_own:
            return _identity, (self.original,)
        return getattr, (self.original.__self__, "forward")  # type: ignore[attr-defined]  # a bound method


class _RegionFunction:
    """The function of an installed forward, as ``__func__``: who wraps it and binds it again keeps the plan.

    It equals the forward that it belongs to: accelerate looks for that among the functions that it has wrapped.
    """

    def __init__(self, forward: RegionForward, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._forward = forward
        self._function = function

    def __call__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the planned forward of its module; of any other module (a shallow copy), the plain one."""
        own = self._forward
        return own(*args, **kwargs) if module is own._module else self._function(module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_A_METHOD - {"__self__"}:
            return getattr(self.__dict__["_function"], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _RegionFunction):
            other = other._forward
        return other is self._forward

    def __hash__(self) -> int:
        return hash(self._forward)

    # As `RegionForward`: what is copied has no plan.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._function

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (self._function,)


def _identity(thing: Any) -> Any:
    return thing
