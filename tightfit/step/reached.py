"""Find what a loss function reaches beside its arguments: a discriminator, a teacher, a momentum encoder, a queue.

Followed are closures, defaults, what a method is bound to, what a `functools.partial` holds, and the globals that the
code names; from there functions and callables of the user's, containers, and attributes of the user's objects.  What is
looked for are modules, tensors and random generators: the state of a training step.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

from tightfit.step.snapshot import generator_state, is_users

#: Objects that are looked through, and how many steps from the function they may be.
_MOST_OBJECTS, _MOST_STEPS = 2000, 5
#: Parts of a container that are looked at: a longer one is data.
_MOST_PARTS = 64


def reached_by(function: Any, model: torch.nn.Module) -> tuple[Any, ...]:
    """Return the modules, tensors and generators that a function reaches, without those of the model."""
    known = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    found: dict[int, Any] = {}
    seen: set[int] = set()
    pending = [(function, 0)]
    for thing, steps in pending:  # which grows
        if id(thing) in seen or id(thing) in known:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.nn.Module | torch.Tensor) or generator_state(thing) is not None:
            found[id(thing)] = thing
        elif steps < _MOST_STEPS and len(seen) < _MOST_OBJECTS:
            pending += [(part, steps + 1) for part in _parts_of(thing)]
    return tuple(found.values())


def _parts_of(thing: Any) -> Iterator[Any]:
    kind = type(thing)
    if kind is types.FunctionType:
        if is_users(thing):
            yield from _of_function(thing)
    elif kind is types.MethodType:
        yield from (thing.__func__, thing.__self__)
    elif issubclass(kind, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif issubclass(kind, list | tuple | set | frozenset):
        yield from list(thing)[:_MOST_PARTS]
    elif issubclass(kind, dict):
        yield from list(thing.values())[:_MOST_PARTS]
    elif not issubclass(kind, type | types.ModuleType) and is_users(kind):
        if isinstance(attributes := getattr(thing, "__dict__", None), dict):
            yield from list(attributes.values())
        yield getattr(kind, "__call__", None)  # noqa: B004  # the function, not whether there is one


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    codes = [function.__code__]
    for code in codes:  # which grows
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    if (wrapped := getattr(function, "__wrapped__", None)) is not None:
        yield wrapped
