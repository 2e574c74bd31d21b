"""Classification: predict one class for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.train.data.dataset_info import DataFacts
from tightfit.train.models.source import TaskName
from tightfit.train.tasks.task import Sums, Task, mean_and_count, prediction_of, samples_in

_Scores = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def image_classification(facts: DataFacts) -> Task:
    """Make the task for samples that are an image and its class number."""
    return _classification("image-classification", _of_images)


def sequence_classification(facts: DataFacts) -> Task:
    """Make the task for samples that are a row of tokens and its class number."""
    return _classification("sequence-classification", _of_text)


def _of_images(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    images, labels = batch
    return prediction_of(model(images), "logits"), labels


def _of_text(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return prediction_of(output, "logits"), batch["labels"]


def _classification(name: TaskName, scores: _Scores) -> Task:
    """Make a classification task; `scores` returns the model's logits and the class numbers of a batch."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(*scores(model, batch))

    def measure(model: nn.Module, batch: Any) -> Sums:
        logits, labels = scores(model, batch)
        count = float(len(labels))
        return {
            "loss": mean_and_count(F.cross_entropy(logits.float(), labels), count),
            "accuracy": (float((logits.argmax(-1) == labels).sum()), count),
        }

    return Task(
        name=name,
        loss=loss,
        weight=samples_in,
        samples_weigh_alike=True,
        measure=measure,
        best="accuracy",
        larger_is_better=True,
    )
