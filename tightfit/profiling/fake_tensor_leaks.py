"""Fake tensors that a fake run left behind outside the structural copy: in a function's cache, a global, a closure.

A later real step would compute with them without an error, so none may stay.  `NamespaceSnapshot` remembers, before
the run, what the user's modules, classes, closures and global objects hold.  Afterwards every fake tensor is followed
to its holders: what was there before is put back, and entries of caches and lists are taken out, as if the run had not
been.  A place that cannot be put back is an error that names it.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tightfit._torch_private import FakeTensor, FakeTensorMode
from tightfit.errors import UnsupportedInput

_log = logging.getLogger(__name__)

_DEPTH = 4
#: Objects looked at, to find out whether something can be reached.
_MOST_HOLDERS = 5000
_CONTAINERS = (dict, list, tuple, set)
_ABSENT: Any = object()
#: Python packages whose globals no model's forward changes.
_FOREIGN = frozenset({"torch", "numpy", "tightfit", "_pytest", "pytest", "pluggy", "sympy"})


class NamespaceSnapshot:
    """What the namespaces around a model held before a fake run.

    From here to `remove_fakes` everything that exists already is set aside from garbage collection, so that looking for
    what the run left behind takes milliseconds however large the process is.
    """

    def __init__(self, loss: Callable[..., Any] | None = None) -> None:
        self._dicts: dict[int, tuple[Any, dict[Any, Any]]] = {}  # of a namespace: its owner, and what it held
        self._cells: dict[int, tuple[types.CellType, Any]] = {}
        self._note_function(loss)
        for name, module in list(sys.modules.items()):
            package = name.partition(".")[0]
            if package in _FOREIGN or (package in sys.stdlib_module_names and package != "__main__"):
                continue
            if issubclass(type(module), types.ModuleType):
                self._note_namespace(module, vars(module))
                for thing in list(vars(module).values()):
                    self._note_thing(thing, name)
        self._made: set[int] | None = None  # ids of what the run made; None: cannot be told
        self._froze = gc.get_freeze_count() == 0  # thawing would undo what the user froze
        if self._froze:
            gc.freeze()

    def _thaw(self) -> None:
        if self._froze:
            gc.unfreeze()
            self._froze = False

    def remove_fakes(self, mode: FakeTensorMode) -> None:
        """Take every fake tensor of `mode` out of where it was left.

        Raises:
            UnsupportedInput: one sits in a place that cannot be put back as it was.
        """
        gc.collect()
        alive = bool(_alive(mode))
        if alive and self._froze:
            self._made = {id(thing) for thing in gc.get_objects()}
        self._thaw()
        if not alive:
            return
        gc.collect()
        for cache in [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper]:
            if _reaches_fake(cache, mode, _DEPTH):
                cache.cache_clear()
        stuck: list[str] = []
        for _ in range(_DEPTH):  # what was taken out may have held others
            fakes = _alive(mode)
            if not fakes:
                return
            ignored = {id(fakes), id(ignored_frame := sys._getframe())}
            stuck = [place for fake in fakes for place in self._take_out(fake, ignored, _DEPTH)]
            del fakes, ignored_frame
            gc.collect()
        if stuck:
            raise UnsupportedInput(
                f"the model stored a tensor in {stuck[0]} while it was measured without data, and what was there "
                "before is lost. A later step would compute with a tensor that has no contents. Run one forward before "
                "measuring (so that it is stored already), or keep such tensors in the module itself."
            )
        _log.debug("%d fake tensors are alive that no Python object holds", len(_alive(mode)))

    def _note_thing(self, thing: Any, module_name: str) -> None:
        kind = type(thing)  # not isinstance, which asks the object: a lazy one would import what it stands for
        if issubclass(kind, type):
            if vars(thing).get("__module__") == module_name:
                self._note_namespace(thing, _class_namespace(thing))
                for member in list(vars(thing).values()):
                    self._note_function(member)
        elif issubclass(kind, types.FunctionType | functools.partial):
            self._note_function(thing)
        elif not issubclass(kind, types.ModuleType | torch.nn.Module) and kind.__module__ != "builtins":
            namespace = _namespace(thing)
            if namespace is not None:
                self._note_namespace(thing, namespace)

    def _note_namespace(self, owner: Any, namespace: dict[str, Any]) -> None:
        self._dicts.setdefault(id(namespace), (owner, dict(namespace)))

    def _note_function(self, thing: Any, depth: int = _DEPTH) -> None:
        """Remember what the function's closure holds, and the functions in it."""
        if isinstance(thing, functools.partial):
            thing = thing.func
        if type(thing) in (staticmethod, classmethod, types.MethodType):
            thing = thing.__func__
        if type(thing) is functools._lru_cache_wrapper:
            thing = thing.__wrapped__
        if type(thing) is not types.FunctionType or not depth:
            return
        for cell in thing.__closure__ or ():
            if id(cell) not in self._cells:
                try:
                    contents = cell.cell_contents
                except ValueError:
                    contents = _ABSENT
                self._cells[id(cell)] = (cell, contents)
                self._note_function(contents, depth - 1)

    def _take_out(self, thing: Any, ignored: set[int], depth: int) -> Iterator[str]:
        """Remove a fake tensor, or a tuple that holds it, from what holds it; yields places where it is stuck."""
        holders = gc.get_referrers(thing)
        ignored = ignored | {id(holders)}
        for holder in holders:
            if id(holder) in ignored or isinstance(holder, types.FrameType | FakeTensor | FakeTensorMode):
                continue
            if isinstance(holder, types.CellType):
                yield from self._empty_cell(holder)
            elif isinstance(holder, dict):
                yield from self._clean_dict(holder, thing)
            elif isinstance(holder, list | deque):
                kept = [part for part in holder if part is not thing]
                holder.clear()
                holder.extend(kept)
            elif isinstance(holder, set):
                holder.discard(thing)
            elif isinstance(holder, tuple | frozenset):
                if depth:
                    yield from self._take_out(holder, ignored, depth - 1)
            elif isinstance(holder, torch.nn.Module):
                pass  # of the copy
            elif isinstance(getattr(holder, "__dict__", None), dict) and not isinstance(holder, type):
                yield from self._clean_dict(vars(holder), thing)
            elif not isinstance(holder, types.BuiltinFunctionType | types.GeneratorType) and _is_slotted(holder, thing):
                yield f"a slot of {type(holder).__name__}"

    def _clean_dict(self, holder: dict[Any, Any], thing: Any) -> Iterator[str]:
        names = [name for name, value in holder.items() if value is thing]
        owner, before = self._dicts.get(id(holder), (None, None))
        if before is not None:
            for name in names:
                _put_back(owner, holder, name, before.get(name, _ABSENT))
        elif names and (place := _owner(holder)):
            if place != "a module":
                yield f"{place}.{names[0]}"
        else:
            for name in names:
                del holder[name]

    def _empty_cell(self, cell: types.CellType) -> Iterator[str]:
        if id(cell) in self._cells:
            contents = self._cells[id(cell)][1]
            if contents is _ABSENT:
                del cell.cell_contents
            else:
                cell.cell_contents = contents
        else:
            functions = _functions_over(cell)
            for function in functions:
                if self._can_be_reached(function, {id(functions)}):
                    yield f"a variable in the closure of {function.__qualname__}"

    def _can_be_reached(self, thing: Any, ignored: set[int]) -> bool:
        """Whether something that the run did not make leads to it.  An autograd graph whose backward never came may
        keep itself alive for ever, but nobody can compute with what is in it.
        """
        if self._made is None:
            return True
        seen = {id(thing)}
        stack = [thing]
        while stack and len(seen) < _MOST_HOLDERS:
            part = stack.pop()
            for holder in gc.get_referrers(part):
                if id(holder) in ignored | seen | {id(stack)}:
                    continue
                if isinstance(holder, types.FrameType | types.GeneratorType):  # this search itself
                    continue
                if id(holder) not in self._made:
                    return True
                seen.add(id(holder))
                stack.append(holder)
            del part
        return bool(stack)


def _namespace(thing: Any) -> dict[str, Any] | None:
    """An object's attributes, without asking the object's own `__getattr__`."""
    try:
        found = object.__getattribute__(thing, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if type(found) is dict else None


def _class_namespace(owner: type) -> dict[str, Any]:
    """The dictionary behind a class's read-only view of it, which is what garbage collection knows."""
    # A subclass of dict for the classes of ctypes, in some versions of Python.
    (namespace,) = [o for o in gc.get_referents(vars(owner)) if isinstance(o, dict)]
    return namespace


def _put_back(owner: Any, namespace: dict[Any, Any], name: Any, before: Any) -> None:
    if isinstance(owner, type):  # not into the dictionary itself: the interpreter caches look-ups of classes
        delattr(owner, name) if before is _ABSENT else setattr(owner, name, before)
    elif before is _ABSENT:
        del namespace[name]
    else:
        namespace[name] = before


def _alive(mode: FakeTensorMode) -> list[Any]:
    return [o for o in gc.get_objects() if type(o) is FakeTensor and o.fake_mode is mode]


def _reaches_fake(thing: Any, mode: FakeTensorMode, depth: int) -> bool:
    for part in gc.get_referents(thing):
        if type(part) is FakeTensor:
            if part.fake_mode is mode:
                return True
        elif depth and type(part) in _CONTAINERS and _reaches_fake(part, mode, depth - 1):
            return True
    return False


def _is_slotted(holder: Any, thing: Any) -> bool:
    names = [name for kind in type(holder).__mro__ for name in _slots_of(kind)]
    return any(getattr(holder, name, None) is thing for name in names)


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _functions_over(cell: types.CellType) -> list[Any]:
    """Functions whose closure a cell is part of; none where only a dead call's frame holds it."""
    closures = [holder for holder in gc.get_referrers(cell) if isinstance(holder, tuple)]
    return [o for closure in closures for o in gc.get_referrers(closure) if isinstance(o, types.FunctionType)]


def _owner(namespace: dict[Any, Any]) -> str:
    """Whose attributes a dictionary holds: a name, "a module" for those of a module (a copy's); '' if nobody's."""
    if namespace.get("__name__") in sys.modules and "__spec__" in namespace:
        return str(namespace["__name__"])
    for owner in gc.get_referrers(namespace):
        if isinstance(owner, torch.nn.Module):
            return "a module"
        if isinstance(owner, type) or getattr(owner, "__dict__", None) is namespace:
            return owner.__name__ if isinstance(owner, type) else type(owner).__name__
    return ""
