"""The interface of a task, and helpers that all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.errors import UnsupportedInput
from tightfit.train.models.source import Loss, TaskName

#: Metrics of one batch: name to (sum, count).
Sums = dict[str, tuple[float, float]]


def _as_they_are(means: Mapping[str, float]) -> dict[str, float]:
    return dict(means)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is trained to do: its loss, what the loss is a mean over, and its metrics."""

    name: TaskName
    loss: Loss
    """(model, batch) to a scalar: the mean over the elements that `weight` counts."""
    weight: Callable[[Any], float]
    """Counts the elements (tokens, samples, time steps) that the mean is over, from the batch alone, so that
    microbatches have exactly the gradients of the batch."""
    samples_weigh_alike: bool = False
    """Each sample has the same number of these elements, so that counting samples is enough."""
    measure: Callable[[nn.Module, Any], Sums]
    """Metrics of one batch, without gradients."""
    summarise: Callable[[Mapping[str, float]], dict[str, float]] = _as_they_are
    """Turns the means over all batches of what `measure` gave into the metrics that people read."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of samples; None: as the data does."""
    is_random: bool = False
    """Whether making a batch draws random numbers."""
    best: str = "loss"
    """The metric that decides which checkpoint is the best."""
    larger_is_better: bool = False

    def is_better(self, now: float, before: float | None) -> bool:
        """Return whether the metric `best` has improved; NaN never has."""
        if now != now:
            return False
        if before is None:
            return True
        return now > before if self.larger_is_better else now < before


def first_tensor(batch: Any) -> Tensor:
    """Return the first tensor in a batch of nested containers.

    Raises:
        UnsupportedInput: there is none.
    """
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    for part in parts:
        try:
            return first_tensor(part)
        except UnsupportedInput:
            continue
    raise UnsupportedInput(
        f"a batch is a {type(batch).__name__} without any tensor, so nothing can be computed from it. "
        f"Let the dataset's samples be tensors, numbers, or tuples and dictionaries of them."
    )


def samples_in(batch: Any) -> float:
    """Count the samples of a batch: the length of its first tensor."""
    tensor = first_tensor(batch)
    return float(len(tensor)) if tensor.dim() else 1.0


def prediction_of(output: Any, what: str) -> Tensor:
    """Return the tensor in a model's output: the output itself, or its ``.logits``.

    Raises:
        UnsupportedInput: there is none.
    """
    tensor = getattr(output, "logits", output)
    if not isinstance(tensor, Tensor):
        raise UnsupportedInput(
            f"the model returned a {type(output).__name__}, but this dataset needs a tensor of {what}, or an object "
            f"with .logits. Let the factory of --model return (module, loss) with loss(model, batch)."
        )
    return tensor


def mean_and_count(loss: Tensor, weight: float) -> tuple[float, float]:
    """Return a mean as (sum, count)."""
    return loss.double().item() * weight, weight


def summed(values: Tensor) -> float:
    """Sum many numbers in float64."""
    return float(values.sum(dtype=torch.float64))
