"""One optimizer step: its microbatches, the gradients' clipping, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tightfit
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.process_group import communication_failed, is_communication_failure
from tightfit.errors import TightfitError
from tightfit.step.batch import describe_batch
from tightfit.train.data.loader import Parts, to_device
from tightfit.train.parallel.ddp import exchanging, is_exchanged
from tightfit.train.parallel.fsdp import whole
from tightfit.train.workload import Workload
from tightfit.units import format_bytes


class TrainingFailed(TightfitError):
    """A run that began well cannot go on."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step leaves behind; tensors on the device, so that nobody waits for it."""

    loss: Tensor
    """Mean over the whole batch; of several processes, what this one had, times their number."""
    gradient_norm: Tensor | None
    """Before clipping; None: gradients are not clipped."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """Takes optimizer steps under a plan.

    Gradients are zeroed in place (``set_to_none=False``) on purpose: the budget counts them as held during the whole
    step, so freeing them in between would only make the measured peak look better than what the step needs.
    """

    work: Workload
    applied: tightfit.Applied
    scaler: torch.amp.GradScaler | None
    model: nn.Module
    """What is called: the workload's, or that wrapped for several processes."""

    def prepare(self, parts: Parts) -> None:
        """Plan the step's batches now if there is no plan for their shapes yet."""
        for part, share in zip(parts, self.work.shares(parts), strict=True):
            self.work.loss.share = share
            self.applied.prepare(to_device(part, self.work.device))

    def take(self, parts: Parts) -> StepOutcome:
        """Take a step on the microbatches of a batch.

        Raises:
            TrainingFailed: the device has no more memory; or not all gradients were exchanged.
        """
        try:
            return self._take(parts)
        except (RuntimeError, MemoryError) as error:
            if not self.work.group.is_single_process and is_communication_failure(error):
                raise communication_failed(error) from error
            if not is_out_of_memory(error):
                raise
            shapes = "; ".join(describe_batch(part) for part in parts)
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainingFailed(
                f"a step on {shapes} ran out of memory ({said}), "
                f"though its predicted peak of {format_bytes(self.applied.plan.predicted_peak_bytes)} is within the "
                f"budget of {format_bytes(self.work.budget_bytes)}: the device has less than that to give, or "
                f"something else took it. Go on from the last checkpoint with --resume auto and a smaller --memory."
            ) from error

    def _take(self, parts: Parts) -> StepOutcome:
        work, scaler = self.work, self.scaler
        work.optimizer.zero_grad(set_to_none=False)
        total: Tensor | None = None
        for place, (part, share) in enumerate(zip(parts, work.shares(parts), strict=True), 1):
            work.loss.share = share
            with exchanging(self.model, last=place == len(parts)):
                loss = self.applied.loss(self.model, to_device(part, work.device))
                (loss if scaler is None else scaler.scale(loss)).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        if not is_exchanged(self.model):
            raise TrainingFailed(
                "a step has left out parameters that the first one gave gradients, so not all gradients were exchanged "
                "between the processes. The step has changed nothing. Go on from the last checkpoint with --resume "
                "auto and --ddp-find-unused-parameters on, which lets each step use other parameters."
            )
        norm = None
        if scaler is not None and work.clip_norm is not None:
            scaler.unscale_(work.optimizer)
        if work.clip_norm is not None:
            norm = whole(torch.nn.utils.clip_grad_norm_(work.model.parameters(), work.clip_norm))
        if scaler is None:
            work.optimizer.step()
        else:
            scaler.step(work.optimizer)
            scaler.update()
        return StepOutcome(loss=total, gradient_norm=norm)
