"""Losses, gradients and weights that are no numbers: noticed before anything of them is saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tightfit._torch_private import tree_leaves
from tightfit.distributed.dtensor import local_shard
from tightfit.train.ema import MovingAverage
from tightfit.train.failures import TrainingFailed
from tightfit.train.workload import Workload


class FiniteGuard:
    """Ends a run before it saves what is not finite.

    Looked at are the loss of each step, and before each checkpoint the weights, the moving average and the optimizer's
    state.  Buffers and frozen weights count only if they were finite when the run began: a mask may hold infinity.
    """

    def __init__(self, work: Workload, average: MovingAverage, checkpoints: Path) -> None:
        self._work = work
        self._average = average
        self._checkpoints = checkpoints
        self._losses_are_finite: Tensor | None = None
        trained = {name for name, parameter in work.model.named_parameters() if parameter.requires_grad}
        self._judged = {name for name, tensor in self._weights() if name in trained or is_finite(tensor)}

    def note(self, loss: Tensor) -> None:
        """Note the loss of a step that is not logged, without waiting for the device."""
        finite = loss.isfinite()
        known = self._losses_are_finite
        self._losses_are_finite = finite if known is None else known.logical_and_(finite)

    def require_finite_step(self, step: int, loss: float, gradient_norm: float | None) -> None:
        """Raise `TrainingFailed` if the loss or the gradients' norm of a logged step is no number."""
        for what, value in (("loss", loss), ("norm of the gradients", gradient_norm)):
            if value is not None and not math.isfinite(value):
                raise self._failure(f"the {what} is {value} at step {step}")

    def require_finite_state(self, step: int) -> None:
        """Raise `TrainingFailed` if what is about to be saved after a step is not finite.  All processes call this."""
        found = [reason for reason in self._work.group.all_gather(self._reason()) if reason]
        if found:
            raise self._failure(f"{found[0]} after step {step}")

    def require_a_step(self, taken: int, skipped: int) -> None:
        """Raise `TrainingFailed` if a run ends in which every step was skipped."""
        if taken and skipped == taken:
            raise TrainingFailed(
                f"all {taken} steps were skipped, as the loss or the gradients of none were finite, so the weights are "
                "those that the run began with, and they are not saved as its model. Look at what the loss is made of "
                "(--on-nonfinite stop ends at the first such step), or try a smaller --lr in another run (--mark NAME)."
            )

    def _reason(self) -> str | None:
        finite, self._losses_are_finite = self._losses_are_finite, None
        for name, tensor in self._weights():
            if name in self._judged and not is_finite(tensor):
                return f"the weights are not finite ({name})"
        for tensor in (*tree_leaves(self._work.optimizer.state_dict()["state"]), *self._average.state_dict().values()):
            if isinstance(tensor, Tensor) and not is_finite(tensor):
                return "the optimizer's state or the weights' average is not finite"
        if finite is not None and not finite.item():
            return "a loss since the last logged step is not finite"
        return None

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._work.model.state_dict().items():
            if isinstance(value, Tensor):
                yield name, value

    def _failure(self, found: str) -> TrainingFailed:
        return TrainingFailed(
            f"{found}, so the weights are no longer of use, and they are not saved. The last checkpoint in "
            f"{self._checkpoints} is from before. Try a smaller --lr in another run (--mark NAME), or go on from the "
            f"checkpoint with --resume auto --on-nonfinite skip, which leaves out steps without finite gradients."
        )


def gradients_are_finite(parameters: Iterable[Tensor]) -> bool:
    """Tell whether every gradient of this process is finite."""
    return all(is_finite(parameter.grad) for parameter in parameters if parameter.grad is not None)


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
