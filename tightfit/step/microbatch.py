"""`Microbatch`: a part of a batch, with the weight of its loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tightfit._torch_private.dispatch import register_pytree_node


@dataclass(frozen=True, eq=False)
class Microbatch:
    """A part of a batch and the weight of its loss, such that the gradients of all parts add up to those of the batch.

    A step sees through it: the loss function and the model get `batch`, and the loss is multiplied by `weight`.
    """

    batch: Any
    weight: float | None = None
    """The part's share of the elements that the loss is a mean over; None: the batch is not split, and its loss is not
    multiplied."""

    def weighted(self, loss: torch.Tensor) -> torch.Tensor:
        """Weigh the loss on `batch`, as it counts in the loss of the whole batch."""
        return loss if self.weight is None else loss * self.weight


def _flatten(microbatch: Microbatch) -> tuple[list[Any], float | None]:
    return [microbatch.batch], microbatch.weight


def _unflatten(children: Iterable[Any], weight: float | None) -> Microbatch:
    (batch,) = children
    return Microbatch(batch, weight)


# All that looks for tensors in nested containers, or maps them, finds those of a microbatch.
register_pytree_node(Microbatch, _flatten, _unflatten)
