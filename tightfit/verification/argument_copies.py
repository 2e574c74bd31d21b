"""Copies of objects among a call's arguments, such as a cache of keys and values, which the call itself writes into."""

from __future__ import annotations

import copy
import enum
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tightfit.interrupts import pass_on


def is_written_into(thing: Any) -> bool:
    """Tell whether a call may leave something in an argument that is no tensor and no container."""
    return hasattr(thing, "__dict__") and not callable(thing) and not isinstance(thing, enum.Enum)


def with_parts_replaced(thing: Any, kind: type, replaced: Callable[[Any], Any]) -> Any:
    """Copy an object with all that it holds, but for modules, which stay; each part of a kind is replaced.

    An object that cannot be copied is returned as it is.
    """
    memo: dict[int, Any] = {}
    parts = list(_parts(thing, kind))
    try:
        for part in parts:
            memo[id(part)] = part if isinstance(part, torch.nn.Module) else replaced(part)
        return copy.deepcopy(thing, memo)
    except Exception as error:  # of whatever kind: its class decides how it is copied
        pass_on(error)
        return thing


def _parts(thing: Any, kind: type) -> Iterator[Any]:
    """Yield the modules, and the things of a kind, that are reached from an object's attributes."""
    pending, seen = [thing], set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, kind | torch.nn.Module):
            yield one
        elif isinstance(one, Mapping):
            pending += one.values()
        elif isinstance(one, list | tuple | set | frozenset | deque):
            pending += one
        elif is_written_into(one):
            pending += vars(one).values()
