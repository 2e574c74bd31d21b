"""How an operation's results lie in memory, and giving a fake kernel's results the layout that the real one's have.

A fake kernel may get it wrong: another stride order makes a later `reshape` copy, or not; one tensor returned twice
where the real kernel returns two; a workspace whose size only the real kernel knows.  What the real kernel returned,
run alone, is put in the place of what the fake one returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tightfit._torch_private import storage_key
from tightfit.operators.facts import result_tensors, tensors_in

#: Of one result: bytes of its storage, position of the first result with the same storage (-1: an argument's), offset,
#: then sizes, then strides. Empty for what is not a strided tensor.
Layout = tuple[int, ...]
Layouts = tuple[Layout, ...]


def layouts_of(result: Any, arguments: Any) -> Layouts:
    """The layout of each result of an operation."""
    places = {storage_key(t): -1 for t in tensors_in(arguments) if t.layout is torch.strided}
    found: list[Layout] = []
    for position, tensor in enumerate(result_tensors(result)):
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            found.append(())
            continue
        place = places.setdefault(storage_key(tensor), position)
        nbytes = int(tensor.untyped_storage().nbytes())
        found.append((nbytes, place, int(tensor.storage_offset()), *tensor.size(), *tensor.stride()))
    return tuple(found)


def corrections(fake: Mapping[str, Layouts], real: Mapping[str, Layouts]) -> dict[str, Layouts]:
    """The real layouts of those operations whose fake kernel returns something else, where it can be corrected."""
    return {key: real[key] for key, found in fake.items() if key in real and _may_replace(found, real[key])}


def _may_replace(fake: Layouts, real: Layouts) -> bool:
    """They differ, and only in how fresh tensors lie: as many, with as many dimensions."""
    if fake == real or len(fake) != len(real):
        return False
    return all(len(a) == len(b) and (not a or min(a[1], b[1]) >= 0) for a, b in zip(fake, real, strict=True))


def with_layouts(result: Any, layouts: Layouts) -> Any:
    """The results anew (without contents), laid out as told."""
    storages: dict[int, torch.Tensor] = {}
    anew: list[Any] = []
    for position, (tensor, layout) in enumerate(zip(result_tensors(result), layouts, strict=True)):
        if not layout:
            anew.append(tensor)
            continue
        nbytes, place, offset, *geometry = layout
        if place == position:
            count = nbytes // tensor.itemsize
            storages[place] = torch.empty(count, dtype=tensor.dtype, device=tensor.device)
        sizes, strides = geometry[: len(geometry) // 2], geometry[len(geometry) // 2 :]
        whole = storages[place]
        if whole.dtype != tensor.dtype:
            whole = whole.view(tensor.dtype)
        anew.append(whole.as_strided(sizes, strides, offset))
    return anew[0] if isinstance(result, torch.Tensor) else type(result)(anew)
