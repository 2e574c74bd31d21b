"""Fake tensors that a fake run left behind outside the structural copy: in a function's cache, in a global dictionary.

A later real step would compute with them without an error, so none may stay.  Cached entries are taken out, as if the
run had not been; what cannot be put back as it was is an error that names the place.
"""

from __future__ import annotations

import functools
import gc
import sys
from typing import Any

import torch

from recollect._torch_private import FakeTensor, FakeTensorMode
from recollect.errors import UnsupportedInput

_DEPTH = 4
_CONTAINERS = (dict, list, tuple, set)


def forget_fakes(mode: FakeTensorMode) -> None:
    """Take every fake tensor of `mode` out of caches. Raises `UnsupportedInput` if one sits where it cannot be."""
    gc.collect()
    if not _alive(mode):
        return
    for cache in [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper]:
        if _reaches_fake(cache, mode, _DEPTH):
            cache.cache_clear()
    stuck = [place for fake in _alive(mode) if (place := _take_out(fake, mode, _DEPTH))]
    if stuck:
        raise UnsupportedInput(
            f"the model stored a tensor in {stuck[0]} while it was measured without data, and what was there before is "
            "lost. A later step would compute with a tensor that has no contents. Run one forward before measuring (so "
            "that it is stored already), or keep such tensors in the module itself."
        )


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


def _take_out(thing: Any, mode: FakeTensorMode, depth: int) -> str:
    """Remove a fake tensor, or a container of it, from the dictionaries that hold it; where it is stuck, else ''."""
    stuck = ""
    for holder in gc.get_referrers(thing):
        if type(holder) is dict:
            owner = _owner(holder)
            names = [name for name, value in holder.items() if value is thing]
            if not owner:
                for name in names:
                    del holder[name]
            elif names and owner != "a module":
                stuck = f"{owner}.{names[0]}"
        elif type(holder) is tuple and depth:
            stuck = _take_out(holder, mode, depth - 1) or stuck
        elif isinstance(getattr(holder, "__dict__", None), dict) and not isinstance(holder, torch.nn.Module | type):
            names = [name for name, value in vars(holder).items() if value is thing]
            if names and type(holder) is not FakeTensor:
                stuck = f"{type(holder).__name__}.{names[0]}"
    return stuck


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
