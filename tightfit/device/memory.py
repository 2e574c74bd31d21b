"""The independent meter: what a step really holds.  It shares no code with the predictor.

Each device has its own: see `Device.measure_peak`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch

from tightfit._torch_private.dispatch import tree_leaves
from tightfit._torch_private.tensors import storage_key
from tightfit.device.device import Device
from tightfit.device.registry import device_for
from tightfit.device.tensor_parts import stored_in

Result = TypeVar("Result")

#: Of a module: its parameters, buffers and children, which are not its attributes.
_TABLES = ("_parameters", "_buffers", "_modules")
_MOST_DEPTH = 4


def resident_bytes(
    model: torch.nn.Module,
    batch: Any = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    beside: Sequence[torch.Tensor] = (),
) -> int:
    """Return what the allocator took for every distinct storage of parameters, buffers, gradients, optimizer state,
    batch, tensors that modules have as attributes, and what is held beside them that lives on the model's device; of
    sharded parameters, this process's shard.
    """
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers(), *attribute_tensors(model), *beside]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    optimizers = optimizer if isinstance(optimizer, Sequence) else [] if optimizer is None else [optimizer]
    for one in optimizers:
        for state in one.state.values():
            tensors += [v for v in (state.values() if isinstance(state, dict) else ()) if isinstance(v, torch.Tensor)]
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif hasattr(leaf, "__dict__"):
            tensors += [v for v in vars(leaf).values() if isinstance(v, torch.Tensor)]
    device = next(model.parameters()).device
    round_up = device_for(device).round_up
    storages = {
        storage_key(t): round_up(t.untyped_storage().nbytes())
        for t in chain.from_iterable(map(stored_in, tensors))
        if t.device == device and t.layout is torch.strided
    }
    return sum(storages.values())


def attribute_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """List the tensors that modules have as attributes, in lists and dictionaries too: masks, rotations, queues.

    Passed over are results of an earlier step's operations, with their history: the step replaces them.
    """
    found: list[torch.Tensor] = []
    for module in model.modules():
        found += tensors_below({name: thing for name, thing in vars(module).items() if name not in _TABLES})
    return [tensor for tensor in found if tensor.grad_fn is None]


def tensors_below(thing: Any, seen: set[int] | None = None, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yield a tensor, or those in a list, tuple, set or dictionary of them and of further ones."""
    seen = set() if seen is None else seen
    if isinstance(thing, torch.Tensor):
        yield thing
    elif id(thing) not in seen and depth < _MOST_DEPTH and isinstance(thing, dict | list | tuple | set):
        seen.add(id(thing))
        for item in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_below(item, seen, depth + 1)


def measure_peak(
    fn: Callable[[], Result],
    resident_bytes: int,
    device: torch.device | str | Device = "cpu",
    *,
    from_empty: bool = True,
) -> tuple[Result, int]:
    """Run `fn` and return its result and the peak, in bytes, in the budget's terms.

    Args:
        fn: what to run, usually one training step.
        resident_bytes: bytes alive before (see `resident_bytes`), for a meter that starts at zero, as a CPU's does.
        device: whose memory to meter.
        from_empty: as `Device.measure_peak`.
    """
    return device_for(device).measure_peak(fn, resident_bytes, from_empty=from_empty)
