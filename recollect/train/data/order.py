"""The order of the data: a pure function of seed and step, so that a resumed run sees exactly the samples that an
uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils.data import default_collate

from recollect.errors import UnsupportedInput
from recollect.train.data.facts import TrainingData


class BatchOrder:
    """Which samples make up which step's batch.

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
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        full, rest = divmod(self._sample_count, self._batch_size)
        return full + (1 if rest > 1 else 0)

    def epoch_of(self, step: int) -> int:
        """The epoch that step ``step`` (the first is 0) belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """The numbers of the samples of step ``step`` (the first is 0)."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            digest = hashlib.sha256(f"{self._seed}:{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            self._permutation = torch.randperm(self._sample_count, generator=generator).tolist()
            self._epoch = epoch
        start = (step % self.steps_per_epoch) * self._batch_size
        return self._permutation[start : start + self._batch_size]

    def first_incomplete(self, first_step: int, total_steps: int) -> int | None:
        """The first step from `first_step` up to `total_steps` whose batch is not full; None if there is none."""
        last_of_epoch = (self.epoch_of(first_step) + 1) * self.steps_per_epoch - 1
        if last_of_epoch >= total_steps or len(self.indices(last_of_epoch)) == self._batch_size:
            return None
        return last_of_epoch


def load_batch(data: TrainingData, indices: list[int], device: torch.device) -> Any:
    """The samples with these numbers as one batch on ``device``."""
    samples = [data.samples[index] for index in indices]
    try:
        batch = default_collate(samples)
    except (RuntimeError, TypeError, ValueError) as problem:
        raise UnsupportedInput(
            f"samples {indices[:4]}... of {data.name} cannot be put into one batch: {problem}. "
            f"Samples must be tensors, numbers, or tuples and dictionaries of them, all of the same shape."
        ) from None
    return _to_device(batch, device)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(_to_device(value, device) for value in batch)
    return batch
