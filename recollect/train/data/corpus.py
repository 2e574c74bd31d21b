"""Text for language models: documents joined into one row of tokens, cut into sequences that follow each other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recollect.errors import UnsupportedInput
from recollect.train.data.facts import DataFacts, TrainingData
from recollect.train.data.tokens import Tokens


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
    tokens: Tokens,
    sequence_length: int,
    origin: str,
    note: str,
) -> TrainingData:
    """Data for language models.

    Args:
        name: enters the run folder's path.
        whole: all documents; they are trained on where one of the two parts is shorter than a sample.
        training, held_out: the two parts.
        tokens: how text becomes numbers.
        sequence_length: tokens in a sample.
        origin: what it is, for people.
        note: what is held out, for people.

    Raises:
        UnsupportedInput: it is shorter than one sample, or a document cannot be read as text.
    """
    parts = [training, held_out]
    corpora = [_joined(part, tokens) for part in parts]
    if min(map(len, corpora)) <= sequence_length:  # too little to hold any of it out
        parts = [whole, []]
        corpora = [_joined(part, tokens) for part in parts]
    samples, evaluation = (TokenSequences(corpus, sequence_length) for corpus in corpora)
    nbytes = [sum(len(document.text) for document in part) for part in parts]
    unit = "bytes" if tokens.is_bytes else "tokens"
    if len(samples) == 0:
        raise UnsupportedInput(
            f"{origin} holds {len(corpora[0])} {unit} of text, but one sample alone takes {sequence_length + 1}. "
            f"Name a longer text as --dataset, or give a smaller --sequence-length."
        )
    digest = hashlib.sha256()
    for corpus in corpora:
        digest.update(len(corpus).to_bytes(8, "big") + corpus.numpy().tobytes())
    counts = f"{nbytes[0]:,} bytes" + ("" if tokens.is_bytes else f" in {len(corpora[0]):,} tokens of {tokens.name}")
    judged = 1 if len(evaluation) else 0
    return TrainingData(
        name=name,
        samples=samples,
        held_out=evaluation if len(evaluation) else None,
        facts=DataFacts(
            kind="text",
            vocabulary_size=tokens.vocabulary_size,
            bytes_per_token=nbytes[judged] / max(1, len(corpora[judged])),
            padding=tokens.padding,
            mask=tokens.mask,
        ),
        fingerprint=f"text:{sequence_length}:{tokens.fingerprint}:{digest.hexdigest()}",
        description=f"{origin}: {counts}, {len(samples):,} sequences of {sequence_length} {unit}"
        + (f"; held out: {note}, {nbytes[1]:,} bytes" if len(evaluation) else ""),
    )


def _joined(documents: Sequence[Document], tokens: Tokens) -> Tensor:
    """All documents in one row, in the smallest type that holds their tokens."""
    if tokens.is_bytes:
        joined = b"\n".join(document.text for document in documents)
        return torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    kind = np.int32
    pieces = []
    for document in documents:
        numbers = tokens.encode(document.text, document.origin)
        pieces.append(np.array([*numbers, *([] if tokens.end is None else [tokens.end])], dtype=kind))
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, dtype=kind))
