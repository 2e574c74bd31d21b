"""A moving average of the weights: often better than the last weights themselves (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tightfit.device import device_for
from tightfit.distributed.dtensor import is_dtensor, local_shard
from tightfit.train.parallel.fsdp import distributed_like


class MovingAverage:
    """The average of the parameters that train; of sharded ones, of this process's shards.

    On CUDA it is kept in host memory.  On a CPU it is part of the budget: `nbytes`.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        """``decay``: how much of the average stays at each step; None: there is no average to keep."""
        self._decay = decay or 0.0
        self._trained = {} if decay is None else {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: local_shard(p).detach().to("cpu", copy=True) for name, p in self._trained.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the budget's device that the average takes."""
        return sum(average.nbytes for name, average in self._average.items() if device_for(self._trained[name]).is_host)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after step ``step`` (the first is 1).

        In the first steps the decay is lower, so that the average does not remember the random start for long.
        """
        decay = min(self._decay, step / (step + 9.0))
        for name, parameter in self._trained.items():
            self._average[name].lerp_(local_shard(parameter).detach().to("cpu"), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights inside the context; afterwards it has its own again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            weights = local_shard(parameter).detach()
            own = weights.to("cpu", copy=True)
            weights.copy_(self._average[name])
            self._average[name].copy_(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average for a checkpoint, distributed like the parameters."""
        return {
            name: distributed_like(average, self._trained[name]) if is_dtensor(self._trained[name]) else average
            for name, average in self._average.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load an average, sharded as the parameters are; raises KeyError or ValueError for another model's."""
        for name, average in self._average.items():
            held = local_shard(state[name])
            if held.shape != average.shape or held.dtype != average.dtype:  # it would be spread over all elements
                raise ValueError(f"the average of {name} is of shape {list(held.shape)}, not {list(average.shape)}")
            average.copy_(held)
