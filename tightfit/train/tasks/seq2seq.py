"""Sequence to sequence: predict a target text from a source text, by an encoder and a decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.train.data.dataset_info import IGNORED, DataFacts
from tightfit.train.tasks.masked_lm import labelled_tokens
from tightfit.train.tasks.task import Sums, Task, mean_and_count, prediction_of


def seq2seq(facts: DataFacts) -> Task:
    """Make the task for samples that are a source row and a target row of tokens."""

    def summarise(means: Mapping[str, float]) -> dict[str, float]:
        return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}

    return Task(name="seq2seq", loss=_loss, weight=labelled_tokens, measure=_measure, summarise=summarise)


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    # The decoder sees the target shifted by one; transformers' models know its first token.
    shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])  # type: ignore[operator]  # transformers' own method
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=shifted)
    return prediction_of(output, "logits")


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(_logits(model, batch).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def _measure(model: nn.Module, batch: Any) -> Sums:
    logits, labels = _logits(model, batch), batch["labels"]
    count = labelled_tokens(batch)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return {
        "loss": mean_and_count(loss, count),
        "token_accuracy": (float(((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()), count),
    }
