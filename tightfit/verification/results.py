"""Read what a forward and backward left behind: gradients, buffers, attributes of modules, the random state."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from tightfit.distributed.dtensor import local_shard
from tightfit.step.host_copy import CopyFile, HostCopy
from tightfit.step.snapshot import RandomState

#: How the name of a gradient begins; the parameter's follows.
GRADIENT = "gradient of "

Results = Mapping[str, object]
"""What a run left behind, by name: `HostCopy` of tensors, `RandomState`, plain values of attributes."""

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
#: What every module holds, and the forward that an installed plan puts there.
_MACHINERY = {*vars(torch.nn.Module()), "forward"} - {"training"}
_MOST_ENTRIES = 256
#: Integers from here on are taken for addresses, which may be others in each run and mean nothing.
_ADDRESSES = 2**40
_MOST_DEPTH = 4


def results_of(model: torch.nn.Module, copies: CopyFile) -> dict[str, object]:
    """Return what a run left behind in a module, and in the random generators.

    Attributes are looked at for numbers, strings and tensors, in containers too.  Passed over are addresses, objects of
    other classes, and what lies deep inside containers or far behind in them.
    """
    found: dict[str, object] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[GRADIENT + name] = HostCopy(local_shard(parameter.grad), copies)
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = HostCopy(local_shard(buffer), copies)
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for attribute, thing in vars(module).items():
            if attribute not in _MACHINERY:
                for name, value in _values(
                    f"attribute {path}.{attribute}" if path else f"attribute {attribute}", thing
                ):
                    if not isinstance(value, torch.Tensor):
                        found[name] = value
                    elif id(value) not in known and not value.is_meta:
                        found[name] = HostCopy(local_shard(value), copies)
    found["random state"] = RandomState()
    return found


def _values(name: str, thing: Any, depth: int = _MOST_DEPTH) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, torch.Tensor) or type(thing) in _VALUES:
        if type(thing) is not int or abs(thing) < _ADDRESSES:
            yield name, thing
    elif depth and isinstance(thing, dict):
        yield f"{name} (length)", len(thing)
        for key, value in islice(thing.items(), _MOST_ENTRIES):
            if type(key) in _VALUES:
                yield from _values(f"{name}[{key!r}]", value, depth - 1)
    elif depth and isinstance(thing, list | tuple | deque):
        yield f"{name} (length)", len(thing)
        for place, value in enumerate(islice(thing, _MOST_ENTRIES)):
            yield from _values(f"{name}[{place}]", value, depth - 1)
    elif isinstance(thing, set | frozenset):
        yield f"{name} (length)", len(thing)
