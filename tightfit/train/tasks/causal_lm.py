"""Causal language modelling: predict each token from those before it.

Padded rows need no attention mask: what is to the right of a token has no part in its prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.train.data.dataset_info import IGNORED, DataFacts
from tightfit.train.tasks.task import Sums, Task, mean_and_count, prediction_of


def causal_lm(facts: DataFacts) -> Task:
    """Make the task for samples that are rows of tokens, one longer than the sequence length."""

    def padded_loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = prediction_of(model(tokens[:, :-1].masked_fill(tokens[:, :-1] == IGNORED, facts.padding)), "logits")
        targets = tokens[:, 1:].reshape(-1)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, ignore_index=IGNORED)

    def padded_targets(tokens: Tensor) -> float:
        return float((tokens[:, 1:] != IGNORED).sum())

    loss_of, targets_of = (padded_loss, padded_targets) if facts.is_padded else (next_token_loss, _targets)

    def measure(model: nn.Module, tokens: Tensor) -> Sums:
        return {"loss": mean_and_count(loss_of(model, tokens), targets_of(tokens))}

    def summarise(means: Mapping[str, float]) -> dict[str, float]:
        loss = means["loss"]
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if facts.bytes_per_token:
            found["bits_per_byte"] = loss / math.log(2) / facts.bytes_per_token
        return found

    return Task(
        name="causal-lm",
        loss=loss_of,
        weight=targets_of,
        samples_weigh_alike=not facts.is_padded,
        measure=measure,
        summarise=summarise,
    )


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of each token, given those before it."""
    logits = prediction_of(model(tokens[:, :-1]), "logits")
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def _targets(tokens: Tensor) -> float:
    return float(tokens[:, 1:].numel())
