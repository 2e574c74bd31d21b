"""The model as DistributedDataParallel: each process has all of it and a part of every batch.

A model that FSDP2 has shared out (see `sharding`) exchanges its gradients by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tightfit._torch_private import gradients_are_reduced
from tightfit.device import device_for
from tightfit.distributed.fsdp import is_sharded
from tightfit.distributed.process_group import ProcessGroup
from tightfit.train.parallel.unused_parameters import Reach


def parallel(
    model: nn.Module, group: ProcessGroup, device: torch.device, *, reach: Reach, accumulation_steps: int = 1
) -> nn.Module:
    """The model, exchanging its gradients with the group's other processes at the end of each backward.

    Gradients are views of the buckets that are exchanged, so in steady state the exchange holds nothing of its own.

    Args:
        model: with the same weights in every process.
        group: the processes.
        device: this process's.
        reach: which parameters a step gives a gradient. Where steps reach the same ones, DDP learns them in the first
            (its static graph); where they vary, each forward looks for those that it does not reach.
        accumulation_steps: with more than one backward in a step, DDP does not learn them.
    """
    if (
        group.is_single_process
        or is_sharded(model)
        or not any(parameter.requires_grad for parameter in model.parameters())
    ):
        return model
    is_static = reach is Reach.SAME and accumulation_steps == 1
    return DistributedDataParallel(
        model,
        device_ids=None if device_for(device).is_host else [device.index],
        gradient_as_bucket_view=True,
        static_graph=is_static,
        find_unused_parameters=reach is not Reach.ALL and not is_static,
    )


def is_exchanged(model: nn.Module) -> bool:
    """After the last backward of a step: False if DDP still waits for a gradient that it was told each step has.

    The optimizer would then use gradients that differ from process to process.
    """
    return not isinstance(model, DistributedDataParallel) or gradients_are_reduced(model)


def bytes_of_exchange(model: nn.Module, group: ProcessGroup) -> int:
    """Bytes held beside a step: after the first one, DDP makes its buckets anew while it still has the old ones."""
    if group.is_single_process or is_sharded(model):
        return 0
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def exchanging(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Inside, a forward and its backward exchange gradients only if they are the ``last`` of a step."""
    quiet = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]  # DDP's
        yield
