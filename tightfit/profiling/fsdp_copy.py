"""Watching a step of a sharded model on a copy: what FSDP2 gathers, exchanges and lets go is memory, too.

The copy is sharded by FSDP2 itself, as the model is, so that weights come and go on it as they do in a real step; only
the exchanges are silent, so that nobody else has to take part.
"""

from __future__ import annotations

from typing import Any

import torch

from tightfit.distributed._fsdp_private import (
    after_backward,
    on_storage_resize,
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
    """See the module.

    Optimizers see each process's part of a parameter as a tensor of its own: what they compute is the same, and what
    they take, too.
    """

    def __init__(self, model: torch.nn.Module, copies: dict[int, Any]) -> None:
        """Shards `copies[id(model)]`; call it where fake tensors are made."""
        self.model: torch.nn.Module = copies[id(model)]
        self._pairs = shard_copy(model, copies)
        gather_ratio, scatter_ratio = collective_workspace(process_group_of(model), device_of(model))
        self._exchanges = CollectiveStandIn(gather_ratio), CollectiveStandIn(scatter_ratio)
        use_collectives(self.model, *self._exchanges)
        self._gathered = unshard_once(self.model)
        self._part_of = {
            id(copied): torch.nn.Parameter(local_shard(copied), requires_grad=copied.requires_grad)
            for _, copied in self._pairs
        }
        self.copies = copies | {id(real): self._part_of[id(copied)] for real, copied in self._pairs}
        """With the parts in place of the sharded parameters."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What optimizers see."""
        return [self._part_of.get(id(parameter), parameter) for parameter in self.model.parameters()]

    @property
    def margin_bytes(self) -> int:
        """What may linger beyond what was watched: on a machine with more processes than cores, gloo's threads may let
        go of an exchange's scratch only after the next one.
        """
        return max(exchange.largest_bytes for exchange in self._exchanges)

    def watch(self, observer: Observer) -> None:
        """Have the observer told of what FSDP2 does; to be called when gradients are there."""
        for _, copied in self._pairs:
            if copied.grad is not None:
                self._part_of[id(copied)].grad = local_shard(copied.grad)
        for tensor in self._gathered:
            observer.add_resizable(tensor)
        on_storage_resize(self.model, observer.resized)
        wrap_fsdp_hooks(self.model, observer.memory_only)
        for exchange in self._exchanges:
            after_backward(self.model, exchange.let_go)
