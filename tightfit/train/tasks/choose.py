"""Choosing the task: what the model can be trained for, on the kind of data that there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import SAMPLE_FORMS, DataFacts, Kind
from tightfit.train.models.source import BuiltModel, Loss, ModelSource
from tightfit.train.tasks.causal_lm import causal_lm
from tightfit.train.tasks.classification import image_classification, sequence_classification
from tightfit.train.tasks.custom import custom
from tightfit.train.tasks.forecast import forecast
from tightfit.train.tasks.masked_lm import masked_lm
from tightfit.train.tasks.seq2seq import seq2seq
from tightfit.train.tasks.task import Task

_BY_KIND: Mapping[Kind, Callable[[DataFacts], Task]] = {
    "text": causal_lm,
    "labelled-text": sequence_classification,
    "text-pairs": seq2seq,
    "images": image_classification,
    "series": forecast,
    "custom": custom,
}


def check_fit(source: ModelSource, facts: DataFacts, dataset: str) -> None:
    """Raise `UnsupportedInput` when this model cannot be trained on this kind of data."""
    if not source.accepts or facts.kind in source.accepts:
        return
    wanted = " or ".join(f"{kind} ({SAMPLE_FORMS[kind]})" for kind in source.accepts)
    raise UnsupportedInput(
        f"the model {source.name!r} is trained on {wanted}, but the dataset {dataset!r} gives {facts.kind} "
        f"({SAMPLE_FORMS[facts.kind]}). Choose a dataset of the model's kind from `tightfit datasets`, or a "
        f"package.module:factory as --model that returns a model and its loss."
    )


def choose_task(source: ModelSource, built: BuiltModel, facts: DataFacts) -> Task:
    """Return the model's task, or the usual one of the data's kind; with the model's own loss, if it came with one."""
    if built.loss is not None:
        return custom(facts, _checked(built.loss))
    if source.task == "masked-lm":
        return masked_lm(facts)
    return _BY_KIND[facts.kind](facts)


def _checked(loss: Loss) -> Loss:
    """Wrap a loss so that it raises for a result that backward cannot start from."""

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

    for name in ("weight", "metrics"):
        if hasattr(loss, name):
            setattr(scalar_loss, name, getattr(loss, name))
    return scalar_loss
