"""Folders that the `datasets` library has saved to disk, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tightfit.errors import UnsupportedInput, first_line
from tightfit.train.data.tables import Table

_HELD_OUT_NAMES = ("validation", "valid", "val", "test")


def is_saved_dataset(path: Path) -> bool:
    """Return whether `save_to_disk` has written the folder: a Dataset, or a DatasetDict."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def read_saved(path: Path) -> Table:
    """Read the rows of a saved dataset; of several splits, ``train`` and the first of validation, valid, val and test.

    Raises:
        UnsupportedInput: it cannot be read, has no split to train on, or the library is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UnsupportedInput(
            f"{path} was saved by the datasets library, which is not installed. "
            f"Install it with: pip install 'tightfit[data]'"
        ) from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as problem:  # the library and Arrow raise all kinds
        raise UnsupportedInput(
            f"{path} cannot be read as a saved dataset: {first_line(problem)}. "
            f"Save it again with save_to_disk, or name another --dataset."
        ) from None
    if not isinstance(loaded, datasets.DatasetDict):
        return _table(path, [loaded], None)
    if "train" not in loaded:
        raise UnsupportedInput(
            f"{path} has the splits {', '.join(loaded)}, but none called train. Save it with one, or name the folder "
            f"of the split to train on: {path / next(iter(loaded), 'SPLIT')}."
        )
    held_out = next((loaded[name] for name in _HELD_OUT_NAMES if name in loaded), None)
    parts = [loaded["train"], *([] if held_out is None else [held_out])]
    return _table(path, parts, None if held_out is None else len(loaded["train"]))


def _table(path: Path, parts: list[Any], held_out_from: int | None) -> Table:
    columns = tuple(parts[0].column_names)
    rows = [tuple(row[name] for name in columns) for part in parts for row in part.select_columns(list(columns))]
    if not rows:
        raise UnsupportedInput(f"{path} holds no rows. Training needs data: name another --dataset.")
    return Table(
        path=path, columns=columns, rows=tuple(rows), lines=tuple(range(1, len(rows) + 1)), held_out_from=held_out_from
    )
