"""The model as DistributedDataParallel: each process has all of it and a part of every batch.

A model that FSDP2 has shared out (see `sharding`) exchanges its gradients by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import recollect
from recollect.group import Group
from recollect.measure.state import TrainingState
from recollect.measure.step import StepSpec
from recollect.sharded import is_sharded


def parallel(model: nn.Module, group: Group, device: torch.device, *, all_reached: bool) -> nn.Module:
    """The model, exchanging its gradients with the group's other processes at the end of each backward.

    Gradients are views of the buckets that are exchanged, so in steady state the exchange holds nothing of its own.

    Args:
        model: with the same weights in every process.
        group: the processes.
        device: this process's.
        all_reached: a step reaches every parameter that trains; otherwise each forward looks for those that it does
            not.
    """
    if group.is_alone or is_sharded(model) or not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=not all_reached,
    )


def bytes_of_exchange(model: nn.Module, group: Group) -> int:
    """Bytes held beside a step: after the first one, DDP makes its buckets anew while it still has the old ones."""
    if group.is_alone or is_sharded(model):
        return 0
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def exchanging(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Inside, a forward and its backward exchange gradients only if they are the ``last`` of a step."""
    quiet = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]  # DDP's
        yield


def reaches_all(model: nn.Module, batch: Any, applied: recollect.Applied, spec: StepSpec) -> bool:
    """Whether a step on ``batch`` gives every parameter that trains a gradient; everything is put back afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = TrainingState(model, spec.optimizers, also=(batch,))
    try:
        for parameter in trained:
            parameter.grad = None
        applied.loss(model, batch).backward()
        return all(parameter.grad is not None for parameter in trained)
    finally:
        state.restore()
