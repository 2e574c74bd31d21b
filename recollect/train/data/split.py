"""Which samples are held out for evaluation: always the same ones, whatever the seed of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from recollect.train.data.facts import Samples


class Part:
    """Some of the samples, in the order of the given numbers."""

    def __init__(self, samples: Samples, numbers: Sequence[int]) -> None:
        self._samples = samples
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        return self._samples[self._numbers[index]]


def is_held_out(name: str, share: float) -> bool:
    """Whether the thing called ``name`` is among the ``share`` that is held out; depends on the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def divided(names: Iterable[str], share: float) -> tuple[list[int], list[int]]:
    """Places of the names for training, and of those that are held out."""
    parts: tuple[list[int], list[int]] = ([], [])
    for place, name in enumerate(names):
        parts[is_held_out(name, share)].append(place)
    return parts
