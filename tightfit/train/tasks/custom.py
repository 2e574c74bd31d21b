"""The task of a user's own model, loss and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import DataFacts
from tightfit.train.models.source import Loss
from tightfit.train.tasks.task import Sums, Task, mean_and_count, samples_in


def custom(facts: DataFacts, loss: Loss | None = None) -> Task:
    """Make the task with the given loss, or the one that the model itself returns.

    The loss is taken for a mean over the samples of a batch.  One that is a mean over something else, such as tokens,
    says so by an attribute ``weight``: a function of the batch that gives their number.  An attribute ``metrics``, a
    function (model, batch) to a dictionary of (sum, count), adds metrics to the loss.
    """
    used = loss or own_loss
    weight = getattr(used, "weight", None)
    weight_of = samples_in if weight is None else weight
    metrics = getattr(used, "metrics", None)

    def measure(model: nn.Module, batch: Any) -> Sums:
        found: Sums = {"loss": mean_and_count(used(model, batch), weight_of(batch))}
        return found if metrics is None else {**found, **metrics(model, batch)}

    return Task(name="custom", loss=used, weight=weight_of, samples_weigh_alike=weight is None, measure=measure)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that the model itself computes for a batch.

    A mapping is passed as keyword arguments, a tuple as positional ones, anything else as one argument. The result is a
    scalar, or has ``.loss`` or ``["loss"]``.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, tuple):
        output = model(*batch)
    else:
        output = model(batch)
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        output = output["loss"]
    elif isinstance(getattr(output, "loss", None), Tensor):
        output = output.loss
    if not isinstance(output, Tensor):
        raise UnsupportedInput(
            f"the model {type(model).__name__} returned a {type(output).__name__} without a loss, so there is nothing "
            f"to train on. Let it return a scalar or an object with .loss, or let the factory of --model return "
            f"(module, loss) with loss(model, batch)."
        )
    if output.numel() != 1:
        raise UnsupportedInput(
            f"the model {type(model).__name__} returned a loss of shape {tuple(output.shape)}, but training needs one "
            f"number. Reduce it to a scalar, e.g. with .mean()."
        )
    return output
