"""Find the variables outside a module that its code names: globals of its Python modules, and closures.

A call may change them (a step counter, a log, a cache), and nothing of the module itself leads there.  Looked at are
the methods of the user's classes, and the user's functions and classes that these name, and so on.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tightfit.step.snapshot import is_users


@dataclass(frozen=True)
class OuterVariable:
    """A variable, where it is bound."""

    name: str
    place: dict[str, Any] | types.CellType | type

    @property
    def value(self) -> Any:
        """What it is bound to."""
        if isinstance(self.place, types.CellType):
            return self.place.cell_contents
        return (self.place if isinstance(self.place, dict) else vars(self.place))[self.name]

    def bind(self, value: Any) -> None:
        """Bind it to something else."""
        if isinstance(self.place, types.CellType):
            self.place.cell_contents = value
        elif isinstance(self.place, dict):
            self.place[self.name] = value
        elif self.value is not value:
            setattr(self.place, self.name, value)


def outer_variables(module: torch.nn.Module) -> list[OuterVariable]:
    """Return the variables that the code of a module, and of the modules inside, names."""
    found: dict[tuple[int, str], OuterVariable] = {}
    seen: set[int] = set()
    stack: list[Any] = []
    for below in module.modules():
        stack += [type(below), *(thing for thing in vars(below).values() if callable(thing))]
    while stack:
        thing = stack.pop()
        if isinstance(thing, types.MethodType):
            thing = thing.__func__
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, type):
            stack += [one for base in thing.__mro__ if is_users(base) for one in _functions_of(base)]
        elif isinstance(thing, types.FunctionType) and is_users(thing):
            for variable in _named_by(thing):
                value = variable.value
                if isinstance(value, types.FunctionType | types.MethodType | type):
                    stack.append(value)
                elif not callable(value) and not isinstance(value, types.ModuleType | torch.nn.Module):
                    found[id(variable.place), variable.name] = variable
    return list(found.values())


def _functions_of(kind: type) -> Iterator[Any]:
    for thing in vars(kind).values():
        if isinstance(thing, property):
            yield from (one for one in (thing.fget, thing.fset) if one is not None)
        else:
            yield thing.__func__ if isinstance(thing, staticmethod | classmethod) else thing


def _named_by(function: types.FunctionType) -> Iterator[OuterVariable]:
    names = set(_names(function.__code__))
    for name in names:
        if name in function.__globals__:
            yield OuterVariable(name, function.__globals__)
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType | type) and is_users(value):  # `settings.step += 1`
                place = value if isinstance(value, type) else vars(value)
                yield from (OuterVariable(other, place) for other in names if other in vars(value))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cell.cell_contents  # noqa: B018  # empty ones raise
        except ValueError:
            continue
        yield OuterVariable(name, cell)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
