"""A process group of which only one process is there: enough to see what it would hold of a sharded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from tightfit.distributed._fsdp_private import store_of_nobody
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.errors import UnsupportedInput


@contextmanager
def pretended_group(world_size: int) -> Iterator[ProcessGroup]:
    """Be rank 0 of so many processes inside the context; collectives move nothing and return at once.

    Raises:
        UnsupportedInput: this process has a process group already.
    """
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    if dist.is_initialized():
        raise UnsupportedInput(
            f"this process already has a process group, so it cannot pretend to be one of {world_size}. Ask for GPUs "
            f"that are not here in a process of its own."
        )
    dist.init_process_group("fake", store=store_of_nobody(), rank=0, world_size=world_size)
    try:
        yield ProcessGroup(rank=0, world_size=world_size, control=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
