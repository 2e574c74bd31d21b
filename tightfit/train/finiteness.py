"""Losses, gradients and weights that are no numbers: noticed before anything of them is saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tightfit._torch_private.dispatch import tree_leaves
from tightfit.distributed.dtensor import local_shard
from tightfit.train.ema import MovingAverage
from tightfit.train.failures import TrainingFailed
from tightfit.train.workload import Workload


class NonFiniteStep(TrainingFailed):
    """The loss or the gradients of a step are no numbers; all processes of the run raise this, and none applies it."""


class FiniteGuard:
    """Ends a run before it saves what is not finite.

    Looked at before each checkpoint are the weights, the moving average and the optimizer's state.  Buffers and frozen
    weights count only if they were finite when the run began: a mask may hold infinity.
    """

    def __init__(self, work: Workload, average: MovingAverage, checkpoints: Path) -> None:
        self._work = work
        self._average = average
        self._checkpoints = checkpoints
        trained = {name for name, parameter in work.model.named_parameters() if parameter.requires_grad}
        self._judged = {name for name, tensor in self._weights() if name in trained or is_finite(tensor)}

    def require_finite_state(self, step: int) -> None:
        """Raise `TrainingFailed` if what is about to be saved after a step is not finite.  All processes call this."""
        found = [reason for reason in self._work.group.all_gather(self._reason()) if reason]
        if found:
            raise TrainingFailed(
                f"{found[0]} after step {step}, so the weights are no longer of use, and they are not saved. The last "
                f"checkpoint in {self._checkpoints} is from before. Try a smaller --lr in another run (--mark NAME)."
            )

    def require_a_step(self, taken: int, skipped: int) -> None:
        """Raise `TrainingFailed` if a run ends in which every step was skipped."""
        if taken and skipped == taken:
            raise TrainingFailed(
                f"all {taken} steps were skipped, as the loss or the gradients of none were finite, so the weights are "
                "those that the run began with, and they are not saved as its model. Look at what the loss is made of "
                "(--on-nonfinite stop ends at the first such step), or try a smaller --lr in another run (--mark NAME)."
            )

    def _reason(self) -> str | None:
        for name, tensor in self._weights():
            if name in self._judged and not is_finite(tensor):
                return f"the weights are not finite ({name})"
        for tensor in (*tree_leaves(self._work.optimizer.state_dict()["state"]), *self._average.state_dict().values()):
            if isinstance(tensor, Tensor) and not is_finite(tensor):
                return "the optimizer's state or the weights' average is not finite"
        return None

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._work.model.state_dict().items():
            if isinstance(value, Tensor):
                yield name, value


def nonfinite_part(loss: Tensor, model: nn.Module | None) -> str | None:
    """Say what of a step is not finite in this process, its loss or a gradient of the model; None: all is."""
    if not math.isfinite(loss.item()):
        return f"the loss is {loss.item()}"
    gradients = {} if model is None else {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if are_finite(gradients.values()):
        return None
    name = next((name for name, gradient in gradients.items() if not is_finite(gradient)), "a parameter")
    return f"the gradient of {name} is no number"


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether every element of this process's shards is finite, waiting for the device once."""
    simple: list[Tensor] = []
    for tensor in tensors:
        values = local_shard(tensor).detach()
        if values.layout is torch.strided and values.itemsize > 1 and values.is_floating_point():
            simple += [values] if values.numel() else []
        elif not is_finite(values):
            return False
    return not simple or math.isfinite(torch.nn.utils.get_total_norm(simple, math.inf).item())


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Tell whether every element of this process's shard is a finite number, without taking memory for the answer."""
    values = local_shard(tensor).detach()
    if values.layout is not torch.strided:
        values = values.coalesce().values() if values.layout is torch.sparse_coo else values.values()
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point() or not values.numel() or values.itemsize == 1:
        return True
    low, high = values.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
