"""Classification: one class for each sample."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recollect.train.data.facts import DataFacts
from recollect.train.tasks.task import Sums, Task, mean_and_count, prediction_of, samples_in


def image_classification(facts: DataFacts) -> Task:
    """For samples that are an image and its class number."""
    return Task(
        name="image-classification",
        loss=classification_loss,
        weight=samples_in,
        measure=_measure,
        best="accuracy",
        larger_is_better=True,
    )


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of the classes."""
    samples, labels = batch
    return F.cross_entropy(prediction_of(model(samples), "logits"), labels)


def _measure(model: nn.Module, batch: Any) -> Sums:
    samples, labels = batch
    logits = prediction_of(model(samples), "logits")
    count = float(len(labels))
    return {
        "loss": mean_and_count(F.cross_entropy(logits.float(), labels), count),
        "accuracy": (float((logits.argmax(-1) == labels).sum()), count),
    }
