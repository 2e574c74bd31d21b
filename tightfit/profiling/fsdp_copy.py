"""A structural copy of a sharded model, on which FSDP2 allocates and frees memory as in a real step.

FSDP2 itself shards the copy, with the model's own settings, so that unsharded weights come and go as they do in a real
step.  Only the collectives are replaced by stand-ins, so that no other rank has to take part.
"""

from __future__ import annotations

from typing import Any

import torch

from tightfit.distributed._fsdp_private import (
    after_backward,
    on_storage_resize,
    place_copy,
    shard_copy,
    unshard_once,
    use_collectives,
    wrap_fsdp_hooks,
)
from tightfit.distributed.dtensor import local_shard
from tightfit.distributed.fsdp import process_group_of
from tightfit.profiling.fsdp_collectives import CollectiveStandIn, collective_workspace
from tightfit.profiling.observer import Observer
from tightfit.step.model import device_of


class ShardedCopy:
    """A structural copy of a model, sharded like the model.

    Optimizers of the copy see each local shard as a plain parameter: they compute the same, in the same memory.
    """

    def __init__(self, model: torch.nn.Module, copies: dict[int, Any], place: torch.device | None = None) -> None:
        """Shard `copies[id(model)]`.  Call it inside the `FakeTensorMode` that made the copies.

        Args:
            model: the sharded model.
            copies: the copies of its modules and tensors, by the id of the original.
            place: where the copies are, if that is a GPU that is not here; NCCL's buffers are none of PyTorch's.
        """
        self.model: torch.nn.Module = copies[id(model)]
        self._pairs = shard_copy(model, copies)
        gather_ratio = scatter_ratio = 0.0
        if place is None:
            gather_ratio, scatter_ratio = collective_workspace(process_group_of(model), device_of(model))
        else:
            place_copy(self.model, place)
        self._collectives = CollectiveStandIn(gather_ratio), CollectiveStandIn(scatter_ratio)
        use_collectives(self.model, *self._collectives)
        self._all_gather_outputs = unshard_once(self.model)
        self._shard_of = {
            id(copied): torch.nn.Parameter(local_shard(copied), requires_grad=copied.requires_grad)
            for _, copied in self._pairs
        }
        self.copies = copies | {id(real): self._shard_of[id(copied)] for real, copied in self._pairs}
        """The given copies, with the local shard in place of each sharded parameter."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters that optimizers see: local shards, and what is not sharded."""
        return [self._shard_of.get(id(parameter), parameter) for parameter in self.model.parameters()]

    @property
    def margin_bytes(self) -> int:
        """Bytes that a real step may hold beyond the observed peak.

        On a node with more processes than cores, gloo's threads may free a collective's workspace only after the next
        collective.
        """
        return max(collective.largest_bytes for collective in self._collectives)

    def watch(self, observer: Observer) -> None:
        """Report FSDP2's allocations to the observer.  Call it once the copy's gradients exist."""
        for _, copied in self._pairs:
            if copied.grad is not None:
                self._shard_of[id(copied)].grad = local_shard(copied.grad)
        for tensor in self._all_gather_outputs:
            observer.add_resizable(tensor)
        on_storage_resize(self.model, observer.resized)
        wrap_fsdp_hooks(self.model, observer.memory_only)
        for collective in self._collectives:
            after_backward(self.model, collective.release)
