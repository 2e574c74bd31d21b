"""Memory layouts of op results, and correcting those of a fake kernel to what the real kernel returns.

A fake kernel may be wrong about the layout: another order of strides makes a later `reshape` copy or not; one tensor is
returned twice where the real kernel returns two; the size of a workspace is known to the real kernel only; what a CUDA
kernel returns in host memory (memory-efficient attention: the random seed of its dropout) is said to be on the GPU.  So
each op is run alone for real, and the layout of its results replaces that of the fake kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tightfit._torch_private.tensors import storage_key
from tightfit.device import device_for
from tightfit.operators.facts import result_tensors, tensors_in

#: One result's layout: bytes of its storage, position of the first result with the same storage (-1: an argument's),
#: storage offset, 1 in host memory and 0 elsewhere, then sizes, then strides. Empty for anything but a strided tensor.
Layout = tuple[int, ...]
Layouts = tuple[Layout, ...]


def layouts_of(result: Any, arguments: Any) -> Layouts:
    """Describe the memory layout of each result of an op."""
    owners = {storage_key(t): -1 for t in tensors_in(arguments) if t.layout is torch.strided}
    layouts: list[Layout] = []
    for position, tensor in enumerate(result_tensors(result)):
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            layouts.append(())
            continue
        owner = owners.setdefault(storage_key(tensor), position)
        nbytes = int(tensor.untyped_storage().nbytes())
        in_host_memory = int(device_for(tensor).is_host)
        layouts.append((nbytes, owner, int(tensor.storage_offset()), in_host_memory, *tensor.size(), *tensor.stride()))
    return tuple(layouts)


def corrections(fake: Mapping[str, Layouts], real: Mapping[str, Layouts]) -> dict[str, Layouts]:
    """Return the real layouts of the ops whose fake kernel returns another one that can be corrected.

    Both mappings and the result are by the key of the signature.
    """
    return {key: real[key] for key, layouts in fake.items() if key in real and _is_correctable(layouts, real[key])}


def _is_correctable(fake: Layouts, real: Layouts) -> bool:
    """Tell whether the layouts differ, and only in those of fresh tensors: as many, with as many dimensions."""
    if fake == real or len(fake) != len(real):
        return False
    return all(len(a) == len(b) and (not a or min(a[1], b[1]) >= 0) for a, b in zip(fake, real, strict=True))


def elsewhere(fake: Layouts, real: Layouts) -> bool:
    """Tell whether a result is in host memory and the fake kernel says that it is not, or the other way round."""
    return any(a and b and a[3] != b[3] for a, b in zip(fake, real, strict=False))


def with_layouts(result: Any, layouts: Layouts, device: torch.device) -> Any:
    """Allocate an op's results again with the given layouts, without their contents.

    `device`: where those are that are not in host memory.
    """
    storages: dict[int, torch.Tensor] = {}
    tensors: list[Any] = []
    for position, (tensor, layout) in enumerate(zip(result_tensors(result), layouts, strict=True)):
        if not layout:
            tensors.append(tensor)
            continue
        nbytes, owner, offset, in_host_memory, *geometry = layout
        if owner == position:
            count = nbytes // tensor.itemsize
            place = torch.device("cpu") if in_host_memory else device
            storages[owner] = torch.empty(count, dtype=tensor.dtype, device=place)
        sizes, strides = geometry[: len(geometry) // 2], geometry[len(geometry) // 2 :]
        flat = storages[owner]
        if flat.dtype != tensor.dtype:
            flat = flat.view(tensor.dtype)
        tensors.append(flat.as_strided(sizes, strides, offset))
    return tensors[0] if isinstance(result, torch.Tensor) else type(result)(tensors)
