"""Models whose parameters FSDP2 (`fully_shard`) has sharded.

Each rank holds a shard of every parameter, as a `DTensor`.  Before a unit (a module that `fully_shard` was called on)
runs, its weights are all-gathered; afterwards they are freed, and all-gathered again in backward.  So every step needs
all ranks, and they have to make the same decisions: measure, fit and verify such a model on all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tightfit.distributed._fsdp_private import ensure_sharded as ensure_sharded
from tightfit.distributed._fsdp_private import forget_iteration as forget_iteration
from tightfit.distributed._fsdp_private import mesh_process_group, modules_of_unit, unsharded_parameters
from tightfit.distributed._fsdp_private import reducing_each_backward as reducing_each_backward
from tightfit.distributed._fsdp_private import sharded_modules as sharded_modules
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup


def is_sharded(model: torch.nn.Module) -> bool:
    """Tell whether `fully_shard` was called on the model or one of its modules."""
    return bool(sharded_modules(model))


def process_group_of(model: torch.nn.Module) -> ProcessGroup:
    """Return the ranks that the model's parameters are sharded over; `SINGLE_PROCESS` if they are not sharded."""
    control = mesh_process_group(model)
    if control is None:
        return SINGLE_PROCESS
    return ProcessGroup(rank=dist.get_rank(control), world_size=dist.get_world_size(control), control=control)


def unreduced_gradient_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all gradients before they are reduced, which a loop holds that lets backwards not reduce."""
    whole = [one for one in unsharded_parameters(model) if one.requires_grad]
    return sum(one.shape.numel() * one.dtype.itemsize for one in whole)


def can_be_called_alone(module: torch.nn.Module) -> bool:
    """Tell whether FSDP2 gathers and frees weights rightly when only this module is called.

    Not where a unit of several modules is partly outside: its weights are freed after the last of them.
    """
    inside = {id(below) for below in module.modules()}
    return all(id(part) in inside for unit in sharded_modules(module) for part in modules_of_unit(unit))


@contextmanager
def gathered(units: Sequence[Any], module: torch.nn.Module) -> Iterator[None]:
    """Gather the weights that `module`, of a model with these units, needs when it is called alone, inside the context.

    Of units, FSDP2 does so itself.  A module within a unit has its gradients in the gathered weights, on each rank its
    own; they are dropped at the end.  All ranks have to call this.
    """
    units = [unit for unit in units if any(below is module for below in unit.modules())]
    if not units or units[-1] is module:
        yield
        return
    units[-1].unshard()
    try:
        yield
    finally:
        for parameter in module.parameters():
            parameter.grad = None
        units[-1].reshard()
