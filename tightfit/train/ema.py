"""A moving average of the weights: often better than the last weights themselves (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tightfit.device import device_for
from tightfit.distributed.dtensor import is_dtensor, local_shard
from tightfit.train.parallel.fsdp import joined_like, part_of


class MovingAverage:
    """Of the parameters that train; everything else of the model is as it is.

    On CUDA it is kept in host memory.  On a CPU it is part of the budget: `nbytes`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Of shared-out parameters, this process's parts.
        self._average = {name: local_shard(p).detach().to("cpu", copy=True) for name, p in self._trained.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the budget's device that the average takes."""
        return sum(average.nbytes for name, average in self._average.items() if device_for(self._trained[name]).is_host)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after step ``step`` (the first is 1) in.

        In the first steps the decay is lower, so that the average does not remember the random start for long.
        """
        decay = min(self._decay, step / (step + 9.0))
        for name, parameter in self._trained.items():
            self._average[name].lerp_(local_shard(parameter).detach().to("cpu"), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._trained.items():
            part = local_shard(parameter).detach()
            own = part.to("cpu", copy=True)
            part.copy_(self._average[name])
            self._average[name].copy_(own)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint; distributed like the parameters."""
        return {
            name: joined_like(average, self._trained[name]) if is_dtensor(self._trained[name]) else average
            for name, average in self._average.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """From a checkpoint, whole; raises KeyError or RuntimeError if it is of another model."""
        for name, average in self._average.items():
            average.copy_(local_shard(part_of(state[name], self._trained[name])))
