"""Rows of CSV, TSV, JSONL and JSON files, each with the place that it comes from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.errors import UnsupportedInput
from tightfit.train.registry import did_you_mean

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")

#: What columns are usually called.
TEXT_NAMES = ("text", "sentence", "content", "document", "review", "article", "question")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment")
SOURCE_NAMES = ("source", "input", "article", "document", "question", "text")
TARGET_NAMES = ("target", "output", "summary", "translation", "answer", "highlights")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that all have the same columns."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    lines: tuple[int, ...]
    """Where each row begins in the file; the first line is 1."""
    held_out_from: int | None = None
    """The rows from this one on are for evaluation; None: there is no such part."""

    def find(self, wanted: str | None, usual: Sequence[str], what: str, flag: str) -> str:
        """Find the column that ``wanted`` names; or, if that is None, the first that has a usual name.

        Raises:
            UnsupportedInput: there is none; the columns are listed.
        """
        if wanted is not None:
            if wanted not in self.columns:
                raise UnsupportedInput(
                    f"{self.path} has no column {wanted!r}, which {flag} names.{did_you_mean(wanted, self.columns)} "
                    f"Its columns are: {', '.join(self.columns)}."
                )
            return wanted
        lowered = {column.lower(): column for column in reversed(self.columns)}
        for name in usual:
            if name in lowered:
                return lowered[name]
        raise UnsupportedInput(
            f"{self.path} has no column that is called like {what} ({', '.join(usual)}), so what to train on is "
            f"unknown. Its columns are: {', '.join(self.columns)}. Name one with {flag}."
        )

    def texts(self, column: str) -> Iterator[tuple[int, str]]:
        """Return line and text of each row.

        Raises:
            UnsupportedInput: a cell is not text.
        """
        place = self.columns.index(column)
        for line, row in zip(self.lines, self.rows, strict=True):
            if not isinstance(row[place], str):
                raise UnsupportedInput(
                    f"{self.path}, line {line}: the column {column!r} holds {row[place]!r}, which is no text. "
                    f"Correct the row, or leave it out."
                )
            yield line, row[place]

    def values(self, column: str) -> list[Any]:
        """Return the column's cells."""
        place = self.columns.index(column)
        return [row[place] for row in self.rows]


def is_table(path: Path) -> bool:
    """Return whether the file is read as a table, by its name."""
    return path.is_file() and path.suffix.lower() in _SUFFIXES


def read_table(path: Path) -> Table:
    """Read the rows of a file.

    Raises:
        UnsupportedInput: it cannot be read, is empty, or is not what its name says; the line is named.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise UnsupportedInput(
            f"{path} cannot be read: {problem.strerror}. The dataset needs it. Make the file readable, or name another "
            f"--dataset."
        ) from None
    except UnicodeDecodeError as problem:
        raise UnsupportedInput(
            f"{path} is not UTF-8 text: byte {problem.start} cannot be read. Convert the file to UTF-8."
        ) from None
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        table = _read_csv(path, text, "\t" if kind == ".tsv" else ",")
    else:
        table = _read_json(path, text, by_line=kind == ".jsonl")
    if not table.rows:
        raise UnsupportedInput(f"{path} holds no rows. Training needs data: name another --dataset.")
    return table


def _read_csv(path: Path, text: str, delimiter: str) -> Table:
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    rows: list[tuple[str, ...]] = []
    lines: list[int] = []
    header: tuple[str, ...] = ()
    try:
        begins = 1
        for row in reader:
            if row and not header:
                header = tuple(name.strip() for name in row)
            elif row:
                if len(row) != len(header):
                    raise UnsupportedInput(
                        f"{path}, line {begins}: there are {len(row)} cells, but the header has {len(header)} columns. "
                        f"Correct the row; a cell with a {delimiter!r} or a line break belongs in quotes."
                    )
                rows.append(tuple(row))
                lines.append(begins)
            begins = reader.line_num + 1
    except csv.Error as problem:
        raise UnsupportedInput(
            f"{path}, line {reader.line_num}: {problem}, so this is no CSV. A cell that is begun with a quote ends "
            f"with one. Correct the file."
        ) from None
    return Table(path=path, columns=header, rows=tuple(rows), lines=tuple(lines))


def _read_json(path: Path, text: str, *, by_line: bool) -> Table:
    entries: list[tuple[int, Any]] = []
    if by_line:
        for line, piece in enumerate(text.splitlines(), 1):
            if piece.strip():
                entries.append((line, _parsed(path, piece, line)))
    else:
        whole = _parsed(path, text, 1)
        if not isinstance(whole, list):
            raise UnsupportedInput(
                f"{path} holds a {type(whole).__name__}, not a list of rows. Write a list of objects, or one object "
                f"per line in a .jsonl file."
            )
        entries = list(enumerate(whole, 1))
    columns: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = []
    for line, entry in entries:
        if not isinstance(entry, dict):
            raise UnsupportedInput(
                f"{path}, row {line}: there is a {type(entry).__name__}, not an object with columns. "
                f'Write rows like {{"text": "...", "label": 0}}.'
            )
        columns = columns or tuple(entry)
        missing = [name for name in columns if name not in entry]
        if missing:
            raise UnsupportedInput(
                f"{path}, row {line}: the column {missing[0]!r} is missing, which the first row has. Correct the row."
            )
        rows.append(tuple(entry[name] for name in columns))
    return Table(path=path, columns=columns, rows=tuple(rows), lines=tuple(line for line, _ in entries))


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UnsupportedInput(
            f"{path}, line {line}: {problem}, so this is no JSON; the file may have been cut off. Correct the line."
        ) from None
