"""Models whose parameters FSDP2 (`fully_shard`) has sharded.

Each rank holds a shard of every parameter, as a `DTensor`.  Before a unit (a module that `fully_shard` was called on)
runs, its weights are all-gathered; afterwards they are freed, and all-gathered again in backward.  So every step needs
all ranks, and they have to make the same decisions: measure, fit and verify such a model on all of them together.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tightfit.distributed._fsdp_private import ensure_sharded as ensure_sharded
from tightfit.distributed._fsdp_private import mesh_process_group, sharded_modules
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
