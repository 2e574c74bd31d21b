"""The order of the data: a pure function of seed and step, so that a resumed run sees exactly the samples that an
uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from tightfit.errors import UnsupportedInput


class BatchOrder:
    """Tells which samples make up the batch of which step.

    Each epoch is a fresh permutation of all samples, drawn from (seed, epoch) alone. The last batch of an epoch may be
    incomplete; one of a single sample is left out, because BatchNorm cannot train on it.
    """

    def __init__(self, *, sample_count: int, batch_size: int, seed: int) -> None:
        if batch_size > sample_count:
            raise UnsupportedInput(
                f"the batch size is {batch_size}, but the dataset has only {sample_count} samples, so not one full "
                f"batch. Give a smaller --batch-size."
            )
        self._sample_count = sample_count
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""
        return self._batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        full, rest = divmod(self._sample_count, self._batch_size)
        return full + (1 if rest > 1 else 0)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that step ``step`` (the first is 0) belongs to."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Return whether step ``step`` (the first is 0) is the last of its epoch."""
        return (step + 1) % self.steps_per_epoch == 0

    def indices(self, step: int) -> list[int]:
        """Return the numbers of the samples of step ``step`` (the first is 0)."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            digest = hashlib.sha256(f"{self._seed}:{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            self._permutation = torch.randperm(self._sample_count, generator=generator).tolist()
            self._epoch = epoch
        start = (step % self.steps_per_epoch) * self._batch_size
        return self._permutation[start : start + self._batch_size]

    def sizes(self, first_step: int, total_steps: int) -> dict[int, int]:
        """Return the sizes of batches from `first_step` up to `total_steps`, each with the first step that has it."""
        found: dict[int, int] = {}
        for step in {first_step, *self._first_epoch_end(first_step, total_steps)}:
            found.setdefault(len(self.indices(step)), step)
        return found

    def _first_epoch_end(self, first_step: int, total_steps: int) -> Iterator[int]:
        last = (self.epoch_of(first_step) + 1) * self.steps_per_epoch - 1
        if last < total_steps:
            yield last
        if first_step == last and last + 1 < total_steps:  # the run begins with the last batch of an epoch
            yield last + 1
