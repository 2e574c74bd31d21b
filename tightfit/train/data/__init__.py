"""Datasets: real data by name, files and folders by path, or a user's own factory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch.utils.data import default_collate

from tightfit.errors import UnsupportedInput
from tightfit.train.data.co2 import load_co2
from tightfit.train.data.corpus import TextForm
from tightfit.train.data.dataset_info import DataFacts, Kind, TrainingData
from tightfit.train.data.digits import load_digits
from tightfit.train.data.image_folder import USUAL_SIZE, is_image_folder, load_image_folder
from tightfit.train.data.rows import Columns, table_data
from tightfit.train.data.saved import is_saved_dataset, read_saved
from tightfit.train.data.tables import is_table, read_table
from tightfit.train.data.text import python_source, text_path
from tightfit.train.data.tokens import BYTES, Tokens
from tightfit.train.factories import call_factory, import_factory
from tightfit.train.registry import Registry, folder_name

__all__ = ["DATASETS", "DataFacts", "DataOptions", "DatasetSource", "TrainingData", "data_name", "load_data"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How data is read."""

    sequence_length: int
    """Tokens or time steps in a sample."""
    accepts: tuple[Kind, ...] = ()
    """Kinds of data that the model can be trained on; empty: any."""
    tokens: Tokens = BYTES
    packed: bool = True
    """Documents for language models are concatenated; see `TextForm`."""
    columns: Columns = field(default_factory=Columns)
    image_size: int | None = None
    """Height and width in pixels; None: the usual."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Of a dataset's factory."""

    @property
    def form(self) -> TextForm:
        """How text becomes samples."""
        return TextForm(sequence_length=self.sequence_length, tokens=self.tokens, packed=self.packed)


class _Load(Protocol):
    def __call__(self, options: DataOptions) -> TrainingData: ...


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A dataset that is known by name."""

    name: str
    summary: str
    """One line for people."""
    kind: Kind
    load: _Load


DATASETS: Registry[DatasetSource] = Registry(
    "dataset",
    {
        "python-source": DatasetSource(
            name="python-source",
            summary="text · the standard library's own source, byte by byte; on every machine",
            kind="text",
            load=lambda options: python_source(options.form),
        ),
        "digits": DatasetSource(
            name="digits",
            summary="images · 1,797 scans of handwritten digits, enlarged to 32x32; comes with scikit-learn",
            kind="images",
            load=lambda options: load_digits(),
        ),
        "co2": DatasetSource(
            name="co2",
            summary="series · weekly changes of CO2 in the air at Mauna Loa, 1958-2001; comes with statsmodels",
            kind="series",
            load=lambda options: load_co2(options.sequence_length),
        ),
    },
    "or give the path of a text file or folder, a CSV, TSV or JSONL file, an image folder, or package.module:factory",
)


def data_name(spec: str) -> str:
    """Return the short name of the data that ``spec`` names, for the run folder's path; nothing is read for it.

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
            f"`tightfit datasets`."
        )
    return DATASETS[spec].name


def load_data(spec: str, options: DataOptions) -> TrainingData:
    """Load the data that ``spec`` names: a known name, a path, or ``package.module:factory``.

    Raises:
        UnsupportedInput: nothing of this name, unreadable, or empty.
    """
    data_name(spec)
    if spec not in DATASETS and not Path(spec).exists():
        return _from_factory(spec, options.arguments)
    if options.arguments:
        shown = " ".join(f"{key}={value}" for key, value in options.arguments.items())
        raise UnsupportedInput(
            f"--dataset-args {shown} was given, but only a package.module:factory takes arguments, not {spec!r}. "
            f"Leave the arguments out."
        )
    return DATASETS[spec].load(options) if spec in DATASETS else _from_path(Path(spec), options)


def _from_path(path: Path, options: DataOptions) -> TrainingData:
    if is_table(path) or is_saved_dataset(path):
        kinds: tuple[Kind, ...] = ("labelled-text", "text-pairs", "text")
        kind: Kind = next((kind for kind in kinds if kind in options.accepts), "text")
        return table_data(
            read_saved(path) if path.is_dir() else read_table(path),
            kind,
            columns=options.columns,
            form=options.form,
        )
    if is_image_folder(path):
        return load_image_folder(path, options.image_size or USUAL_SIZE)
    return text_path(path, options.form)


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
    note = "" if held_out is None else f"; held out: {len(held_out):,}"
    return TrainingData(
        name=folder_name(spec),
        samples=samples,
        held_out=held_out,
        facts=DataFacts(kind="custom"),
        fingerprint=f"factory:{spec}:{len(samples)}",
        description=f"{spec}: {len(samples):,} samples{note}",
        collate=getattr(samples, "collate", default_collate),
        sizes_vary=True,
        is_random=True,
    )
