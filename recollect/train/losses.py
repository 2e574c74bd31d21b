"""The loss of each kind of data, and the rule for models that come with their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recollect.errors import UnsupportedInput
from recollect.train.data.facts import SAMPLE_FORMS, DataFacts, Kind
from recollect.train.models.source import BuiltModel, Loss, ModelSource


def choose_loss(built: BuiltModel, facts: DataFacts) -> Loss:
    """The loss that came with the model, else the one of the data's kind."""
    return _checked(built.loss or _BY_KIND[facts.kind])


def check_fit(source: ModelSource, facts: DataFacts, dataset: str) -> None:
    """Raise `UnsupportedInput` when this model cannot be trained on this kind of data."""
    if not source.accepts or facts.kind in source.accepts:
        return
    wanted = " or ".join(f"{kind} ({SAMPLE_FORMS[kind]})" for kind in source.accepts)
    raise UnsupportedInput(
        f"the model {source.name!r} is trained on {wanted}, but the dataset {dataset!r} gives {facts.kind} "
        f"({SAMPLE_FORMS[facts.kind]}). Choose a dataset of the model's kind from `recollect datasets`, or a "
        f"package.module:factory as --model that returns a model and its loss."
    )


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token, given those before it."""
    logits = _prediction(model(tokens[:, :-1]), "logits")
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def next_step_loss(model: nn.Module, series: Tensor) -> Tensor:
    """Mean squared error of each step of a series, given those before it."""
    return F.mse_loss(_prediction(model(series[:, :-1]), "prediction"), series[:, 1:])


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of the classes of images."""
    images, labels = batch
    return F.cross_entropy(_prediction(model(images), "logits"), labels)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model itself returns for a batch.

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
    return output


_BY_KIND: dict[Kind, Loss] = {
    "text": next_token_loss,
    "images": classification_loss,
    "series": next_step_loss,
    "custom": own_loss,
}


def _prediction(output: Any, what: str) -> Tensor:
    """The tensor in a model's output: the output itself, or its ``.logits``."""
    tensor = getattr(output, "logits", output)
    if not isinstance(tensor, Tensor):
        raise UnsupportedInput(
            f"the model returned a {type(output).__name__}, but this dataset needs a tensor of {what}, or an object "
            f"with .logits. Let the factory of --model return (module, loss) with loss(model, batch)."
        )
    return tensor


def _checked(loss: Loss) -> Loss:
    """``loss``, refusing what backward cannot start from."""

    def scalar_loss(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        if not isinstance(value, Tensor):
            raise UnsupportedInput(
                f"the loss is a {type(value).__name__}, not a tensor, so there is nothing to differentiate. "
                f"Return a scalar tensor."
            )
        if value.numel() != 1:
            raise UnsupportedInput(
                f"the loss has the shape {tuple(value.shape)}, but training needs one number. "
                f"Reduce it to a scalar, e.g. with .mean()."
            )
        return value

    return scalar_loss
