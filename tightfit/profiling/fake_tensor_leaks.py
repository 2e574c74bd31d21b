"""Find and remove fake tensors that a fake run left outside the structural copy: in a cache, a global, a closure.

A later real step would compute with them without an error, so none may stay.  `NamespaceSnapshot` records, before the
first run, what the user's modules, classes, closures and global objects hold.  After each run it follows every fake
tensor to its holders with `gc.get_referrers`.  A holder that was recorded gets its old content back.  The fake tensor
is removed from lists, sets and dictionaries that are nobody's attributes, and from `functools.lru_cache`.  A place that
cannot be restored is an error that names it.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tightfit._torch_private.dispatch import FakeTensor, FakeTensorMode
from tightfit.errors import UnsupportedInput

_log = logging.getLogger(__name__)

_MAX_DEPTH = 4
#: Objects visited before a search for a reachable holder gives up and answers yes.
_MAX_HOLDERS = 5000
_CONTAINERS = (dict, list, tuple, set)
_ABSENT: Any = object()
#: Stands for the owner of a module's attributes: the structural copy's.
_OF_COPY = "a module"
#: Attributes of a module that its import set, and that nobody else changes.
_OF_IMPORT = frozenset({"__spec__", "__loader__"})
#: Types of most globals, which lead to no namespace.
_INERT = frozenset({str, int, float, bool, type(None), tuple, list, dict, types.BuiltinFunctionType, types.ModuleType})
#: Packages whose globals no model's forward changes.
_LIBRARIES = frozenset(
    """
    Cython PIL _pytest anyio certifi charset_normalizer cython datasets dateutil dill execnet filelock fsspec google
    h11 highspy httpcore httpx huggingface_hub hypothesis idna iniconfig jinja2 markupsafe matplotlib mpmath
    multiprocess numpy packaging pandas pluggy psutil pyarrow pygments pytest regex requests rich safetensors scipy
    sklearn sniffio sortedcontainers statsmodels sympy tensorboard tightfit tokenizers torch torchgen tqdm
    truststore typing_extensions urllib3 xdist xxhash yaml
    """.split()  # noqa: SIM905  # one word a line would be a page
)


class NamespaceSnapshot:
    """A record of what the namespaces around a model held before the fake runs of one measurement."""

    def __init__(self, loss: Callable[..., Any] | None = None) -> None:
        self._dicts: dict[int, tuple[Any, dict[Any, Any]]] = {}  # by the id of a namespace: its owner and content
        self._cells: dict[int, tuple[types.CellType, Any]] = {}
        self._modules: set[str] = set()  # names of those that were looked at
        self._new_ids: set[int] = set()  # ids of the objects that the run made
        self._remember_function(loss)
        self._remember_modules()

    @contextmanager
    def removing_fakes(self, mode: FakeTensorMode) -> Iterator[None]:
        """Remove every fake tensor of `mode` from wherever the run inside leaves it.

        Inside, `gc.freeze` hides all objects that exist already from garbage collection, so that the search for what
        the run left takes milliseconds however large the process is.  What somebody else had frozen is looked through
        only if something is left, and frozen again.

        Raises:
            UnsupportedInput: one is in a place whose old content is lost.
        """
        self._remember_modules()  # what an earlier run imported
        is_ours = gc.get_freeze_count() == 0  # gc.unfreeze would also undo somebody else's gc.freeze
        older: set[int] = set()  # ids of the objects that nobody had frozen
        if is_ours:
            gc.freeze()
        else:
            older = {id(thing) for thing in gc.get_objects()}
        try:
            yield
        finally:
            gc.collect()
            alive = bool(_living_fakes(mode))
            if alive:
                self._new_ids = {id(thing) for thing in gc.get_objects()} - older
            if is_ours or alive:
                gc.unfreeze()
            try:
                if alive:
                    self._remove_fakes(mode)
            finally:
                if alive and not is_ours:
                    gc.freeze()

    def _remember_modules(self) -> None:
        """Record the modules that were not looked at yet."""
        for name, module in list(sys.modules.items()):
            if name in self._modules:
                continue
            self._modules.add(name)
            package = name.partition(".")[0]
            if package in _LIBRARIES or (package in sys.stdlib_module_names and package != "__main__"):
                continue
            if issubclass(type(module), types.ModuleType):
                self._remember_namespace(module, vars(module))
                for attribute, thing in list(vars(module).items()):
                    kind = type(thing)
                    if kind is types.FunctionType and not thing.__closure__:
                        continue
                    if kind not in _INERT and attribute not in _OF_IMPORT:
                        self._remember(thing, name)

    def _remove_fakes(self, mode: FakeTensorMode) -> None:
        gc.collect()
        for cache in [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper]:
            if _holds_fake(cache, mode, _MAX_DEPTH):
                cache.cache_clear()
        stuck: list[str] = []
        for _ in range(_MAX_DEPTH):  # a removed object may have held others
            fakes = _living_fakes(mode)
            if not fakes:
                return
            stuck = list(self._remove(fakes, set(), _MAX_DEPTH))
            del fakes
            gc.collect()
        if stuck:
            raise UnsupportedInput(
                f"the model stored a tensor in {stuck[0]} while it was measured without data, and what was there "
                "before is lost. A later step would compute with a tensor that has no data. Run one forward before "
                "measuring (so that the tensor is stored already), or keep such tensors in the module itself."
            )
        _log.debug("%d fake tensors are still alive, held by no Python object", len(_living_fakes(mode)))

    def _remember(self, thing: Any, module_name: str) -> None:
        kind = type(thing)  # isinstance reads `__class__`: a lazy module would then import what it stands for
        if kind is types.FunctionType:
            self._remember_function(thing)
        elif issubclass(kind, type):
            if vars(thing).get("__module__") == module_name:
                self._remember_namespace(thing, _class_namespace(thing))
                for member in list(vars(thing).values()):
                    if type(member) is not types.FunctionType or member.__closure__:
                        self._remember_function(member)
        elif issubclass(kind, functools.partial):
            self._remember_function(thing)
        elif kind.__module__ != "builtins" and not issubclass(kind, (types.ModuleType, torch.nn.Module)):
            namespace = _namespace(thing)
            if namespace is not None:
                self._remember_namespace(thing, namespace)

    def _remember_namespace(self, owner: Any, namespace: dict[str, Any]) -> None:
        self._dicts.setdefault(id(namespace), (owner, dict(namespace)))

    def _remember_function(self, thing: Any, depth: int = _MAX_DEPTH) -> None:
        """Record the content of a function's closure, and of the closures of functions in it."""
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
                self._remember_function(contents, depth - 1)

    def _remove(self, things: list[Any], ignored: set[int], depth: int) -> Iterator[str]:
        """Remove fake tensors, or tuples that contain them, from their holders; yield places that cannot be restored.

        All at once, as finding holders means to walk over everything that Python holds.
        """
        wanted = {id(thing) for thing in things}
        holders = gc.get_referrers(*things)
        ignored = ignored | {id(things), id(holders)}
        tuples: list[Any] = []
        cells: list[types.CellType] = []
        unknown: list[dict[Any, Any]] = []
        for holder in holders:
            if id(holder) in ignored or isinstance(holder, types.FrameType | FakeTensor | FakeTensorMode):
                continue
            if isinstance(holder, types.CellType):
                if not self._restore_cell(holder):
                    cells.append(holder)
            elif isinstance(holder, dict):
                if not self._put_back(holder, wanted):
                    unknown.append(holder)
            elif isinstance(holder, list | deque):
                kept = [part for part in holder if id(part) not in wanted]
                holder.clear()
                holder.extend(kept)
            elif isinstance(holder, set):
                holder.difference_update([part for part in holder if id(part) in wanted])
            elif isinstance(holder, tuple | frozenset):
                tuples.append(holder)
            elif isinstance(holder, torch.nn.Module):
                pass  # the structural copy's
            elif isinstance(getattr(holder, "__dict__", None), dict) and not isinstance(holder, type):
                if not self._put_back(vars(holder), wanted):
                    unknown.append(vars(holder))
            elif not isinstance(holder, types.BuiltinFunctionType | types.GeneratorType) and _is_in_slot(
                holder, wanted
            ):
                yield f"a slot of {type(holder).__name__}"
        if unknown:
            yield from _empty(unknown, wanted)
        if cells:
            yield from self._reachable_closures(cells)
        if tuples and depth:
            yield from self._remove(tuples, ignored | {id(unknown), id(cells)}, depth - 1)

    def _put_back(self, holder: dict[Any, Any], wanted: set[int]) -> bool:
        """Put back what a recorded namespace held in place of some objects; tell whether it was recorded."""
        owner, before = self._dicts.get(id(holder), (None, None))
        if before is not None:
            for name in _names_of(wanted, holder):
                _restore(owner, holder, name, before.get(name, _ABSENT))
        return before is not None

    def _restore_cell(self, cell: types.CellType) -> bool:
        """Put back what a recorded cell held; tell whether it was recorded."""
        if id(cell) not in self._cells:
            return False
        contents = self._cells[id(cell)][1]
        if contents is _ABSENT:
            del cell.cell_contents
        else:
            cell.cell_contents = contents
        return True

    def _reachable_closures(self, cells: list[types.CellType]) -> Iterator[str]:
        """Name the closures with such cells that somebody can still call.

        Not those that only the frame of an ended call holds.
        """
        closures = [holder for holder in gc.get_referrers(*cells) if isinstance(holder, tuple)]
        functions = [o for o in gc.get_referrers(*closures) if isinstance(o, types.FunctionType)] if closures else []
        for function in functions:
            if self._is_reachable(function, {id(functions)}):
                yield f"a variable in the closure of {function.__qualname__}"

    def _is_reachable(self, thing: Any, ignored: set[int]) -> bool:
        """Tell whether an object older than the run refers to `thing`, directly or through others.

        An autograd graph without a backward may keep itself alive in a cycle, but no later step can compute with it.
        """
        seen = {id(thing)}
        parts = [thing]
        while parts and len(seen) < _MAX_HOLDERS:
            holders = gc.get_referrers(*parts)
            further: list[Any] = []
            ignored |= {id(parts), id(holders), id(further)}
            for holder in holders:
                # Frames and generators are this search itself.
                if id(holder) in ignored | seen or isinstance(holder, types.FrameType | types.GeneratorType):
                    continue
                if id(holder) not in self._new_ids:
                    return True
                seen.add(id(holder))
                further.append(holder)
            parts = further
        return bool(parts)


def _namespace(thing: Any) -> dict[str, Any] | None:
    """Return an object's attributes without calling its own `__getattr__`."""
    try:
        found = object.__getattribute__(thing, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if type(found) is dict else None


def _class_namespace(owner: type) -> dict[str, Any]:
    """Return the dictionary behind a class's read-only `__dict__`, the one that `gc` reports."""
    # A subclass of dict for the classes of ctypes, in some versions of Python.
    (namespace,) = [o for o in gc.get_referents(vars(owner)) if isinstance(o, dict)]
    return namespace


def _restore(owner: Any, namespace: dict[Any, Any], name: Any, before: Any) -> None:
    if isinstance(owner, type):  # a direct write to its dictionary would bypass the interpreter's attribute cache
        delattr(owner, name) if before is _ABSENT else setattr(owner, name, before)
    elif before is _ABSENT:
        del namespace[name]
    else:
        namespace[name] = before


def _living_fakes(mode: FakeTensorMode) -> list[Any]:
    return [o for o in gc.get_objects() if type(o) is FakeTensor and o.fake_mode is mode]


def _holds_fake(thing: Any, mode: FakeTensorMode, depth: int) -> bool:
    for part in gc.get_referents(thing):
        if type(part) is FakeTensor:
            if part.fake_mode is mode:
                return True
        elif depth and type(part) in _CONTAINERS and _holds_fake(part, mode, depth - 1):
            return True
    return False


def _is_in_slot(holder: Any, wanted: set[int]) -> bool:
    names = [name for kind in type(holder).__mro__ for name in _slots_of(kind)]
    return any(id(getattr(holder, name, None)) in wanted for name in names)


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _names_of(wanted: set[int], holder: dict[Any, Any]) -> list[Any]:
    return [name for name, value in holder.items() if id(value) in wanted]


def _empty(holders: list[dict[Any, Any]], wanted: set[int]) -> Iterator[str]:
    """Remove objects from dictionaries, but not from attributes: yield the names of those that are not a module's."""
    owners = _owner_names(holders)
    for holder in holders:
        names = _names_of(wanted, holder)
        if not names:
            continue
        if place := owners.get(id(holder), ""):
            if place != _OF_COPY:
                yield f"{place}.{names[0]}"
        else:
            for name in names:
                del holder[name]


def _owner_names(namespaces: list[dict[Any, Any]]) -> dict[int, str]:
    """Name the objects whose attributes dictionaries hold, by the dictionary's id; nothing where one is nobody's."""
    found = {
        id(namespace): str(namespace["__name__"])
        for namespace in namespaces
        if namespace.get("__name__") in sys.modules and "__spec__" in namespace
    }
    wanted = {id(namespace) for namespace in namespaces}
    for owner in gc.get_referrers(*namespaces):
        for namespace in gc.get_referents(owner):
            if id(namespace) not in wanted or id(namespace) in found:
                continue
            if isinstance(owner, torch.nn.Module):
                found[id(namespace)] = _OF_COPY
            elif isinstance(owner, type) or getattr(owner, "__dict__", None) is namespace:
                found[id(namespace)] = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    return found
