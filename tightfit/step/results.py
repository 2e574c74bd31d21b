"""Read what a forward and backward left behind: gradients, buffers, attributes of modules, the random state."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import islice
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.distributed.dtensor import local_shard
from tightfit.step.snapshot import RandomState, attributes_of, class_attributes_of, generator_state, is_array

#: How the name of a gradient begins; the parameter's follows.
GRADIENT = "gradient of "
#: How the name of an attribute begins; the paths of module and attribute follow.
ATTRIBUTE = "attribute "

Keep = Callable[[str, torch.Tensor], object]
"""Returns what to keep of a tensor's contents, given the name of what it is."""

Results = Mapping[str, object]
"""What a run left behind, by name: `HostCopy` or `Mark` of tensors, `RandomState`, plain values of attributes."""

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
#: What every module holds, and the forward that an installed plan puts there.
_MACHINERY = {*vars(torch.nn.Module()), "forward"} - {"training"}
_MOST_ENTRIES = 256
#: Integers from here on are taken for addresses, which may be others in each run and mean nothing.
_ADDRESSES = 2**40
_MOST_DEPTH = 6
#: A tensor or array of another object than a module is looked at up to this size: it may hold a dataset.
_MOST_BYTES = 2**20
_ADDRESS_IN_TEXT = re.compile(r"0x[0-9a-f]{6,}")


def results_of(model: torch.nn.Module, keep: Keep) -> dict[str, object]:
    """Return what a run left behind in a module, and in the random generators.

    Attributes are looked at for numbers, strings, tensors, arrays and random generators, in containers and objects of
    the user's classes too.  Passed over are addresses, and what lies deep inside containers or far behind in them.
    """
    found: dict[str, object] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[GRADIENT + name] = keep(GRADIENT + name, local_shard(parameter.grad))
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = keep(f"buffer {name}", local_shard(buffer))
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, thing in (class_attributes_of(type(module)) | vars(module)).items():
            if attribute not in _MACHINERY:
                name = ATTRIBUTE + (f"{path}.{attribute}" if path else attribute)
                found |= values_in(name, thing, keep, seen, known)
    found["random state"] = RandomState()
    return found


def values_in(name: str, thing: Any, keep: Keep, seen: set[int], known: Set[int] = frozenset()) -> dict[str, object]:
    """Return what an object holds: numbers, strings, tensors, arrays and random generators, by names that begin so.

    Args:
        name: the object's.
        thing: the object.
        keep: what to keep of tensors.
        seen: numbers (`id`) of objects that were looked at, to which its own are added.
        known: numbers of tensors to pass over.
    """
    found: dict[str, object] = {}
    for own_name, value in _values(name, thing, seen):
        if not isinstance(value, torch.Tensor):
            found[own_name] = value
        elif id(value) not in known and _has_contents(value):
            found[own_name] = keep(own_name, local_shard(value))
    return found


def _has_contents(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor can be copied: it is of a device of this machine, which ``meta`` is not."""
    return device_for(tensor).count() > 0 and not (tensor.is_quantized or tensor.is_nested)


def _values(name: str, thing: Any, seen: set[int], depth: int = _MOST_DEPTH) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, torch.Tensor) or type(thing) in _VALUES:
        if not _is_address(thing):
            yield name, thing
        return
    if not depth or id(thing) in seen:
        return
    seen.add(id(thing))
    entries: list[tuple[str, Any]] = []
    if isinstance(thing, dict):
        entries = [(f"{name}[{key!r}]", value) for key, value in _first(thing.items()) if _is_key(key)]
    elif isinstance(thing, list | tuple | deque):
        entries = [(f"{name}[{place}]", value) for place, value in enumerate(_first(thing))]
    elif is_array(thing):
        if thing.nbytes <= _MOST_BYTES:
            yield name, hashlib.sha256(thing.tobytes()).hexdigest()
    elif (state := generator_state(thing)) is not None:
        data = state.numpy().tobytes() if isinstance(state, torch.Tensor) else repr(state).encode()
        yield name, hashlib.sha256(data).hexdigest()
    elif not isinstance(thing, torch.nn.Module | torch.optim.Optimizer):
        entries = [
            (f"{name}.{attribute}", value)
            for attribute, value in _first(attributes_of(thing).items())
            if not (isinstance(value, torch.Tensor) and value.numel() * value.itemsize > _MOST_BYTES)
        ]
    if isinstance(thing, dict | list | tuple | deque | set | frozenset):
        yield f"{name} (length)", len(thing)
    for own_name, value in entries:
        yield from _values(own_name, value, seen, depth - 1)


def _first(things: Iterable[Any]) -> list[Any]:
    return list(islice(things, _MOST_ENTRIES))


def _is_key(key: object) -> bool:
    """Tell whether a key means the same in each run."""
    if type(key) is tuple:
        return all(_is_key(part) for part in key)
    return type(key) in _VALUES and not _is_address(key)


def _is_address(thing: object) -> bool:
    if type(thing) is str:
        return _ADDRESS_IN_TEXT.search(thing) is not None
    return type(thing) is int and abs(thing) >= _ADDRESSES
