"""Carbon dioxide at Mauna Loa: the weekly readings that come with statsmodels."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import DataFacts, TrainingData

#: The last part of the series is held out: a forecast is evaluated on what came later.
HELD_OUT_SHARE = 0.2
_WEEKS_PER_YEAR = 52


class Windows:
    """Sample ``i`` is the window of a series that starts at ``i``, one step longer than the sequence length."""

    def __init__(self, series: Tensor, sequence_length: int) -> None:
        self._series = series
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return max(len(self._series) - self._sequence_length, 0)

    def __getitem__(self, index: int) -> Tensor:
        return self._series[index : index + self._sequence_length + 1]


def load_co2(sequence_length: int) -> TrainingData:
    """Load weekly CO2 in the air, 1958-2001 (Keeling & Whorf, Scripps); the few missing weeks repeat the week before.

    The series is that of the changes from week to week: the level rises over the decades, out of the range that a model
    was trained on.  The last fifth of the weeks is held out.
    """
    try:
        from statsmodels.datasets import co2 as readings
    except ModuleNotFoundError:
        raise UnsupportedInput(
            "the dataset 'co2' comes with statsmodels, which is not installed. "
            "Install it with: pip install 'tightfit[data]'"
        ) from None
    column = readings.load_pandas().data["co2"]
    weekly = [float(reading) for reading in column.ffill()]
    changes = torch.tensor(weekly, dtype=torch.float64).diff().to(torch.float32).unsqueeze(1)
    end = int(len(changes) * (1 - HELD_OUT_SHARE))
    series = (changes - changes[:end].mean()) / changes[:end].std()
    samples, held_out = (Windows(part, sequence_length) for part in (series[:end], series[end:]))
    if len(samples) == 0:
        raise UnsupportedInput(
            f"the dataset 'co2' has {end} weeks for training, but one sample alone takes {sequence_length + 1}. "
            f"Give a smaller --sequence-length."
        )
    return TrainingData(
        name="co2",
        samples=samples,
        held_out=held_out if len(held_out) else None,
        facts=DataFacts(kind="series", features=1, season=_WEEKS_PER_YEAR),
        fingerprint=f"co2:changes:{sequence_length}:{hashlib.sha256(repr(weekly).encode()).hexdigest()}",
        description=f"CO2 at Mauna Loa: {end:,} weekly changes, {len(samples):,} windows of {sequence_length} weeks; "
        f"held out: the last {len(changes) - end:,} weeks",
    )
