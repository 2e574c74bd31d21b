"""Datasets: real data by name, a path to text, or a user's own factory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.utils.data import default_collate

from recollect.errors import UnsupportedInput
from recollect.train.data.co2 import co2
from recollect.train.data.digits import digits
from recollect.train.data.facts import DataFacts, Kind, TrainingData
from recollect.train.data.text import python_source, text_path
from recollect.train.factories import call_factory, import_factory
from recollect.train.naming import Registry, folder_name

__all__ = ["DATASETS", "DataFacts", "DatasetSource", "TrainingData", "data_name", "load_data"]


class _Load(Protocol):
    def __call__(self, sequence_length: int) -> TrainingData: ...


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A dataset that is known by name."""

    name: str
    summary: str
    """One line for people."""
    kind: Kind
    load: _Load
    """Makes the data; the sequence length matters only to text and series."""


DATASETS: Registry[DatasetSource] = Registry(
    "dataset",
    {
        "python-source": DatasetSource(
            name="python-source",
            summary="text · the standard library's own source, byte by byte; on every machine",
            kind="text",
            load=python_source,
        ),
        "digits": DatasetSource(
            name="digits",
            summary="images · 1,797 scans of handwritten digits, enlarged to 32x32; comes with scikit-learn",
            kind="images",
            load=lambda sequence_length: digits(),
        ),
        "co2": DatasetSource(
            name="co2",
            summary="series · weekly changes of CO2 in the air at Mauna Loa, 1958-2001; comes with statsmodels",
            kind="series",
            load=co2,
        ),
    },
    "or give the path of a text file or folder, or package.module:factory",
)


def data_name(spec: str) -> str:
    """The short name of the data that ``spec`` names, for the run folder's path; nothing is read for it.

    A known name goes before a path of the same spelling: write ``./digits`` for a folder called so.

    Raises:
        UnsupportedInput: no known name, no existing path, and not ``package.module:factory``.
    """
    if spec in DATASETS:
        return spec
    path = Path(spec)
    if path.exists():
        return folder_name(path.resolve().stem)
    if ":" in spec:
        return folder_name(spec)
    if "/" in spec or path.suffix:
        raise UnsupportedInput(
            f"there is no file or folder {spec!r}, which --dataset names. Check the path, or choose a name from "
            f"`recollect datasets`."
        )
    return DATASETS[spec].name


def load_data(spec: str, *, sequence_length: int, arguments: Mapping[str, object]) -> TrainingData:
    """The data that ``spec`` names: a known name, a path, or ``package.module:factory``.

    Raises:
        UnsupportedInput: nothing of this name, unreadable, or empty.
    """
    data_name(spec)
    if spec not in DATASETS and not Path(spec).exists():
        return _from_factory(spec, arguments)
    if arguments:
        raise UnsupportedInput(
            f"--dataset-args {' '.join(f'{key}={value}' for key, value in arguments.items())} was given, but only a "
            f"package.module:factory takes arguments, not {spec!r}. Leave the arguments out."
        )
    return (
        DATASETS[spec].load(sequence_length=sequence_length)
        if spec in DATASETS
        else text_path(Path(spec), sequence_length)
    )


def _from_factory(spec: str, arguments: Mapping[str, object]) -> TrainingData:
    factory = import_factory(spec, flag="--dataset")
    made = call_factory(factory, arguments, what=f"--dataset {spec}", arguments_flag="--dataset-args")
    samples, held_out = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    for part in (samples,) if held_out is None else (samples, held_out):
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise UnsupportedInput(
                f"--dataset {spec} returned a {type(part).__name__} without a length or numbered samples, so an exact "
                f"resume would be impossible. Return an object with __len__ and __getitem__, such as a list, or a pair "
                f"of them: for training and for evaluation."
            )
        if len(part) == 0:
            raise UnsupportedInput(
                f"--dataset {spec} returned no samples. Training needs data: return at least a batch."
            )
    further = "" if held_out is None else f"; held out: {len(held_out):,}"
    return TrainingData(
        name=folder_name(spec),
        samples=samples,
        held_out=held_out,
        facts=DataFacts(kind="custom"),
        fingerprint=f"factory:{spec}:{len(samples)}",
        description=f"{spec}: {len(samples):,} samples{further}",
        collate=getattr(samples, "collate", default_collate),
        is_random=True,
    )
