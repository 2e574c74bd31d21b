"""What a model specification resolves to, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from tightfit.train.data.dataset_info import DataFacts, Kind

Loss = Callable[[nn.Module, Any], Tensor]

TaskName = Literal[
    "causal-lm", "masked-lm", "sequence-classification", "seq2seq", "image-classification", "forecast", "custom"
]


class BuiltModel(NamedTuple):
    """A model, and the loss that came with it."""

    module: nn.Module
    loss: Loss | None
    """None: the one of the data's task."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Something that can build a model once the data is known."""

    name: str
    """As the user wrote it."""
    summary: str
    """One line for people."""
    accepts: tuple[Kind, ...]
    """Kinds of data that it can be trained on; empty: whatever its factory says."""
    build: Callable[[DataFacts, int, Mapping[str, object]], BuiltModel]
    """Builds the model from the data's facts, the sequence length, and the user's ``--model-args``."""
    task: TaskName | None = None
    """The task that it is trained for; None: the usual one for the data."""
    folder: Path | None = None
    """Where its files are, perhaps with a tokenizer."""
    default_dataset: str = ""
    """Used when no dataset is named; empty: one must be named."""
    sequence_length: int = 256
    """Used when none is given."""
