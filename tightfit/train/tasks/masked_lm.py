"""Masked language modelling: predict masked tokens from those around them (Devlin et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tightfit.train.data.dataset_info import IGNORED, DataFacts
from tightfit.train.tasks.task import Sums, Task, mean_and_count, prediction_of

_SHARE = 0.15


class Masking:
    """Makes a batch of rows of tokens: of 15 % of the tokens, 8 in 10 are masked, one is replaced and one stays.

    Which ones is drawn from PyTorch's generator, which the loader seeds for each batch: another choice in each epoch,
    and the same one after a resume.
    """

    def __init__(self, facts: DataFacts) -> None:
        self._mask = facts.mask_token
        self._vocabulary_size = facts.vocabulary_size
        self._padding = facts.padding
        self._is_padded = facts.is_padded

    def __call__(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the model's input, and the labels of the chosen tokens: -100 elsewhere."""
        rows = list(samples) if self._is_padded else [sample[:-1] for sample in samples]
        tokens = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        real = tokens != IGNORED
        chosen = (torch.rand(tokens.shape) < _SHARE) & real
        chosen[:, 0] |= ~chosen.any(dim=1)  # a row without any would have no loss
        fate = torch.rand(tokens.shape)
        hidden = torch.where(chosen & (fate < 0.8), self._mask, tokens)
        replaced = torch.randint(self._vocabulary_size, tokens.shape)
        shown = torch.where(chosen & (fate >= 0.9), replaced, hidden)
        batch = {"input_ids": shown, "labels": torch.where(chosen, tokens, IGNORED)}
        if self._is_padded:
            batch |= {"input_ids": shown.masked_fill(~real, self._padding), "attention_mask": real.long()}
        return batch


def masked_lm(facts: DataFacts) -> Task:
    """Make the task for samples that are rows of tokens."""

    def summarise(means: Mapping[str, float]) -> dict[str, float]:
        return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}

    return Task(
        name="masked-lm",
        loss=_loss,
        weight=labelled_tokens,
        measure=_measure,
        summarise=summarise,
        collate=Masking(facts),
        is_random=True,
    )


def labelled_tokens(batch: Mapping[str, Tensor]) -> float:
    """Count the tokens that the loss is a mean over."""
    return float((batch["labels"] != IGNORED).sum())


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return prediction_of(model(**{name: part for name, part in batch.items() if name != "labels"}), "logits")


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
