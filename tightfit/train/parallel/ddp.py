"""The model as DistributedDataParallel: each process has all of it and a share of every batch.

A model that FSDP2 has sharded (see `fsdp`) reduces its gradients by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tightfit._torch_private.modules import gradients_are_reduced
from tightfit.device import device_for
from tightfit.distributed.fsdp import is_sharded
from tightfit.distributed.process_group import ProcessGroup
from tightfit.train.failures import TrainingFailed
from tightfit.train.parallel.unused_parameters import UnusedParameters


def data_parallel(
    model: nn.Module,
    group: ProcessGroup,
    device: torch.device,
    *,
    unused: UnusedParameters,
    accumulation_steps: int = 1,
) -> nn.Module:
    """Wrap the model so that its gradients are all-reduced at the end of each backward; alone or sharded, it stays.

    Gradients are views of DDP's buckets, so that the all-reduce holds nothing of its own after the first step.

    Args:
        model: with the same weights in every process.
        group: the processes.
        device: this process's.
        unused: which parameters a step leaves without a gradient. Where all steps leave out the same ones, DDP learns
            them in the first (its static graph); where they vary, each forward looks for them.
        accumulation_steps: with more than one backward in a step, DDP does not learn them.
    """
    if (
        group.is_single_process
        or is_sharded(model)
        or not any(parameter.requires_grad for parameter in model.parameters())
    ):
        return model
    is_static = unused is UnusedParameters.SAME and accumulation_steps == 1
    return DistributedDataParallel(
        model,
        device_ids=None if device_for(device).is_host else [device.index],
        gradient_as_bucket_view=True,
        static_graph=is_static,
        find_unused_parameters=unused is not UnusedParameters.NONE and not is_static,
    )


@contextmanager
def all_reducing(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Let a forward and its backward all-reduce gradients only if they are the ``last`` of a step."""
    is_quiet = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if is_quiet else nullcontext():  # type: ignore[operator]  # DDP's
        yield


def require_all_reduced(model: nn.Module) -> None:
    """Raise `TrainingFailed` if DDP, after a step's last backward, still waits for a gradient.

    The optimizer would then use gradients that differ from process to process.
    """
    if isinstance(model, DistributedDataParallel) and not gradients_are_reduced(model):
        raise TrainingFailed(
            "a step has left out parameters that the first one gave gradients, so not all gradients were all-reduced "
            "between the processes. The step has changed nothing. Go on from the last checkpoint with --resume "
            "auto and --ddp-find-unused-parameters on, which lets each step use other parameters."
        )


def settling_steps(model: nn.Module, group: ProcessGroup, steps_done: int) -> int:
    """Count the steps until DDP sums as it does after `steps_done` steps.

    It lays out its buckets anew after the first step, and divides by the number of processes otherwise in the first two
    than later.  Both move the last bits of a sum of three or more.
    """
    is_wrapped = isinstance(model, DistributedDataParallel)
    return min(steps_done, 2) if is_wrapped and group.world_size > 2 else 0


def bucket_bytes(model: nn.Module, group: ProcessGroup) -> int:
    """Bytes held beside a step: after the first one, DDP makes its buckets anew while it still has the old ones."""
    if group.is_single_process or is_sharded(model):
        return 0
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
