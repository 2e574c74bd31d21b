"""Text for language models: documents concatenated and cut into sequences, or each on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import IGNORED, DataFacts, Samples, TrainingData
from tightfit.train.data.tokens import BYTES, Tokens


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """How text becomes samples."""

    sequence_length: int
    """Tokens in a sample, at most."""
    tokens: Tokens = BYTES
    packed: bool = True
    """Documents are concatenated and all samples equally long; else a sample is of one document."""


class TokenSequences:
    """Sample ``i`` holds tokens ``i * length`` to ``(i + 1) * length``, the last one included: it is the next input's
    first token and this sample's last target.
    """

    def __init__(self, corpus: Tensor, sequence_length: int) -> None:
        self._corpus = corpus
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, (len(self._corpus) - 1) // self._sequence_length)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self._sequence_length
        return self._corpus[start : start + self._sequence_length + 1].long()


class DocumentSequences:
    """Samples of one document each, and all of its text: a longer one is several samples, which follow each other."""

    def __init__(self, rows: Sequence[Tensor], sequence_length: int) -> None:
        self._pieces = [
            row[start : start + sequence_length + 1]
            for row in rows
            for start in range(0, len(row) - 1, sequence_length)
        ]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> Tensor:
        return self._pieces[index].long()


def padded(samples: Sequence[Tensor]) -> Tensor:
    """Make a batch of rows of tokens: shorter ones are padded at their right with what the loss ignores."""
    return pad_sequence(list(samples), batch_first=True, padding_value=IGNORED)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A piece of text, and what it is called in errors."""

    text: bytes
    origin: str


def language_data(
    name: str,
    whole: Sequence[Document],
    training: Sequence[Document],
    held_out: Sequence[Document],
    *,
    form: TextForm,
    origin: str,
    note: str,
) -> TrainingData:
    """Make data for language models.

    Args:
        name: enters the run folder's path.
        whole: all documents; they are trained on where one of the two parts is shorter than a sample.
        training, held_out: the two parts.
        form: how text becomes samples.
        origin: what it is, for people.
        note: what is held out, for people.

    Raises:
        UnsupportedInput: it is shorter than one sample, or a document cannot be read as text.
    """
    tokens = form.tokens
    documents = [training, held_out]
    parts = [_Split(part, form) for part in documents]
    if not all(len(part.samples) for part in parts):  # too little to hold any of it out
        documents = [whole, []]
        parts = [_Split(part, form) for part in documents]
    samples, evaluation = (part.samples for part in parts)
    nbytes = [sum(len(document.text) for document in part) for part in documents]
    unit = "bytes" if tokens.is_bytes else "tokens"
    if len(samples) == 0:
        least = f"one sample alone takes {form.sequence_length + 1}" if form.packed else "no document has two"
        raise UnsupportedInput(
            f"{origin} holds {parts[0].token_count} {unit} of text, but {least}. "
            f"Name a longer text as --dataset, or give a smaller --sequence-length."
        )
    digest = hashlib.sha256()
    for part in parts:
        for row in part.rows:
            digest.update(len(row).to_bytes(8, "big") + row.numpy().tobytes())
    counts = f"{nbytes[0]:,} bytes"
    counts += "" if tokens.is_bytes else f" in {parts[0].token_count:,} tokens of {tokens.name}"
    sequences = f"{len(samples):,} sequences of {'' if form.packed else 'up to '}{form.sequence_length} {unit}"
    evaluated = 1 if len(evaluation) else 0
    return TrainingData(
        name=name,
        samples=samples,
        held_out=evaluation if len(evaluation) else None,
        facts=DataFacts(
            kind="text",
            vocabulary_size=tokens.vocabulary_size,
            bytes_per_token=nbytes[evaluated] / max(1, parts[evaluated].token_count),
            padding=tokens.padding,
            mask=tokens.mask,
            is_padded=not form.packed,
        ),
        fingerprint=f"text:{form.sequence_length}:{'' if form.packed else 'alone:'}{tokens.fingerprint}:"
        f"{digest.hexdigest()}",
        description=f"{origin}: {counts}, {sequences}"
        + (f"; held out: {note}, {nbytes[1]:,} bytes" if len(evaluation) else ""),
        collate=default_collate if form.packed else padded,
        sizes_vary=not form.packed,
    )


class _Split:
    """Documents as samples."""

    def __init__(self, documents: Sequence[Document], form: TextForm) -> None:
        groups = [documents] if form.packed else [[document] for document in documents]
        self.rows = [_joined(group, form.tokens) for group in groups]
        self.token_count = sum(len(row) for row in self.rows)
        self.samples: Samples
        if form.packed:
            self.samples = TokenSequences(self.rows[0], form.sequence_length)
        else:
            self.samples = DocumentSequences(self.rows, form.sequence_length)


def _joined(documents: Sequence[Document], tokens: Tokens) -> Tensor:
    """Concatenate documents to one row of tokens, in the smallest type that holds them."""
    if tokens.is_bytes:
        joined = b"\n".join(document.text for document in documents)
        return torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    kind = np.int32
    pieces = []
    for document in documents:
        numbers = tokens.encode(document.text, document.origin)
        pieces.append(np.array([*numbers, *([] if tokens.end is None else [tokens.end])], dtype=kind))
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, dtype=kind))
