"""Which samples are held out for evaluation: always the same ones, whatever the seed of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from tightfit.train.data.dataset_info import Samples


class Subset:
    """Some of the samples, in the order of the given numbers."""

    def __init__(self, samples: Samples, numbers: Sequence[int]) -> None:
        self._samples = samples
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        return self._samples[self._numbers[index]]


def split_by_hash(names: Iterable[str], share: float) -> tuple[list[int], list[int]]:
    """Split places into those for training and those held out: the share whose names' digests are smallest."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    count = round(len(digests) * share)
    held_out = set(sorted(range(len(digests)), key=digests.__getitem__)[:count])
    places = range(len(digests))
    return [place for place in places if place not in held_out], sorted(held_out)


def spread(samples: Samples, most: int) -> Samples:
    """Return at most so many of the samples, evenly spread over them; all if ``most`` is 0."""
    count = len(samples)
    if not most or count <= most:
        return samples
    return Subset(samples, [number * count // most for number in range(most)])
