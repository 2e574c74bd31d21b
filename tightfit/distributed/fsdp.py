"""Models whose parameters are shared out among processes by FSDP2 (`fully_shard`).

Each process holds a part of every parameter, as a `DTensor`.  Before a unit (a module that `fully_shard` was called on)
runs, its weights are gathered; afterwards they are let go, and in backward gathered again.  So every step needs all
processes, and they have to decide the same things: whoever measures, fits or verifies such a model does so on all of
them together.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tightfit.distributed._fsdp_private import ensure_sharded as ensure_sharded
from tightfit.distributed._fsdp_private import mesh_process_group, sharded_modules
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `fully_shard` was called on the model or a part of it."""
    return bool(sharded_modules(model))


def process_group_of(model: torch.nn.Module) -> ProcessGroup:
    """The processes that share the model's parameters; `SINGLE_PROCESS` for a model that is not sharded."""
    control = mesh_process_group(model)
    if control is None:
        return SINGLE_PROCESS
    return ProcessGroup(rank=dist.get_rank(control), world_size=dist.get_world_size(control), control=control)
