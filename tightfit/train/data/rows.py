"""Text in the rows of a table: documents, texts with a class, or source and target texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tightfit.errors import UnsupportedInput
from tightfit.train.data.corpus import Document, TextForm, language_data
from tightfit.train.data.dataset_info import IGNORED, DataFacts, Kind, TrainingData
from tightfit.train.data.split import Subset, split_by_hash
from tightfit.train.data.tables import LABEL_NAMES, SOURCE_NAMES, TARGET_NAMES, TEXT_NAMES, Table
from tightfit.train.data.tokens import Tokens

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table are used; None: found by their usual names."""

    text: str | None = None
    label: str | None = None
    target: str | None = None


def table_data(table: Table, kind: Kind, *, columns: Columns, form: TextForm) -> TrainingData:
    """Make data of a kind from the rows of a table.

    Where the table has no part for evaluation, a tenth of the rows is held out, by a hash of their numbers.

    Raises:
        UnsupportedInput: a column or a row is not as it must be.
    """
    if kind == "labelled-text":
        return _labelled(table, columns, form.tokens, form.sequence_length)
    if kind == "text-pairs":
        return _pairs(table, columns, form.tokens, form.sequence_length)
    column = table.find(columns.text, TEXT_NAMES, "a text", "--text-column")
    documents: list[Document] = []
    places: list[int] = []
    for place, (line, text) in enumerate(table.texts(column)):
        if text:
            documents.append(Document(text=text.encode(), origin=f"{table.path}, line {line}"))
            places.append(place)
    training, held_out = ([documents[number] for number in part] for part in _split(table, places))
    return language_data(
        table.path.stem,
        documents,
        training,
        held_out,
        form=form,
        origin=f"the column {column!r} of {table.path}",
        note=f"{len(held_out):,} of {len(documents):,} rows",
    )


class _Padded:
    """Makes a batch of samples, padding the shorter ones at their right."""

    def __init__(self, padding: int) -> None:
        self._padding = padding

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self._padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }
        labels = [sample["labels"] for sample in samples]
        if labels[0].dim():
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        else:
            batch["labels"] = torch.stack(labels)
        return batch


def _labelled(table: Table, columns: Columns, tokens: Tokens, sequence_length: int) -> TrainingData:
    text = table.find(columns.text, TEXT_NAMES, "a text", "--text-column")
    label = table.find(columns.label, LABEL_NAMES, "a class", "--label-column")
    numbers, names = _classes(table, label)
    rows = _rows(table, text, tokens, sequence_length)
    samples = {
        place: {"input_ids": row, "labels": torch.tensor(number)}
        for place, (row, number) in enumerate(zip(rows, numbers, strict=True))
        if len(row)
    }
    return _data(
        table, "labelled-text", samples, tokens, sequence_length, classes=len(names) or max(numbers) + 1, names=names
    )


def _pairs(table: Table, columns: Columns, tokens: Tokens, sequence_length: int) -> TrainingData:
    source = table.find(columns.text, SOURCE_NAMES, "a source", "--text-column")
    target = table.find(columns.target, TARGET_NAMES, "a target", "--target-column")
    pairs = zip(
        _rows(table, source, tokens, sequence_length), _rows(table, target, tokens, sequence_length), strict=True
    )
    samples = {place: {"input_ids": a, "labels": b} for place, (a, b) in enumerate(pairs) if len(a) and len(b)}
    return _data(table, "text-pairs", samples, tokens, sequence_length)


def _rows(table: Table, column: str, tokens: Tokens, sequence_length: int) -> list[Tensor]:
    """Return the tokens of each row, cut off at the sequence length, with an end token if there is one."""
    rows = []
    for line, text in table.texts(column):
        numbers = list(tokens.encode(text.encode(), f"{table.path}, line {line}"))[:sequence_length]
        if numbers and tokens.end is not None:
            numbers = [*numbers[: sequence_length - 1], tokens.end]
        rows.append(torch.tensor(numbers, dtype=torch.int64))
    return rows


def _classes(table: Table, column: str) -> tuple[list[int], tuple[str, ...]]:
    """Return the number of each row's class, and the names of the classes; no names if the file has numbers."""
    cells = table.values(column)
    numbers = [_as_number(cell) for cell in cells]
    if any(number is None for number in numbers):
        for line, cell in zip(table.lines, cells, strict=True):
            if not isinstance(cell, str | int) or cell == "":
                raise UnsupportedInput(
                    f"{table.path}, line {line}: the class is {cell!r}, but it is a name or a number from 0 on. "
                    f"Correct the row, or name another column with --label-column."
                )
        names = tuple(sorted({str(cell) for cell in cells}))
        places = {name: place for place, name in enumerate(names)}
        return [places[str(cell)] for cell in cells], names
    known = [number for number in numbers if number is not None]
    for line, number in zip(table.lines, known, strict=True):
        if number < 0:
            raise UnsupportedInput(
                f"{table.path}, line {line}: the class is {number}, but classes are numbered from 0. "
                f"Correct the row, or write names instead of numbers."
            )
    if max(known) >= len(table.rows):
        line = table.lines[known.index(max(known))]
        raise UnsupportedInput(
            f"{table.path}, line {line}: the class is {max(known)}, but there are only {len(table.rows)} rows, so most "
            f"classes would be empty. Is {column!r} the column of the class? Name it with --label-column."
        )
    return known, ()


def _as_number(cell: Any) -> int | None:
    if isinstance(cell, bool):
        return int(cell)
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return int(number) if number == int(number) else None


def _split(table: Table, places: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split the rows at these places into those for training and those for evaluation."""
    begin = table.held_out_from
    if begin is None:
        return split_by_hash((f"row {number}" for number in range(len(places))), HELD_OUT_SHARE)
    numbers = range(len(places))
    return [n for n in numbers if places[n] < begin], [n for n in numbers if places[n] >= begin]


def _data(
    table: Table,
    kind: Kind,
    by_place: dict[int, dict[str, Any]],
    tokens: Tokens,
    sequence_length: int,
    classes: int = 0,
    names: tuple[str, ...] = (),
) -> TrainingData:
    if not by_place:
        raise UnsupportedInput(f"every row of {table.path} is empty. Training needs data: name another --dataset.")
    samples = list(by_place.values())
    training, held_out = _split(table, list(by_place))
    digest = hashlib.sha256(repr((table.columns, table.rows)).encode()).hexdigest()
    empty = len(table.rows) - len(samples)
    note = f" in {classes} classes" if classes else ""
    return TrainingData(
        name=table.path.stem,
        samples=Subset(samples, training),
        held_out=Subset(samples, held_out) if held_out else None,
        facts=DataFacts(
            kind=kind,
            vocabulary_size=tokens.vocabulary_size,
            padding=tokens.padding,
            mask=tokens.mask,
            classes=classes,
            label_names=names,
        ),
        fingerprint=f"{kind}:{sequence_length}:{tokens.fingerprint}:{digest}",
        description=f"{table.path}: {len(training):,} rows{note}, {tokens.name}"
        + (f"; held out: {len(held_out):,}" if held_out else "")
        + (f"; {empty:,} empty rows are left out" if empty else ""),
        collate=_Padded(tokens.padding),
        sizes_vary=True,
    )
