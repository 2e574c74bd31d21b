"""Batches in the order of the steps, made in this process or by workers: the same ones either way.

What a sample draws at random is seeded by its batch alone, so neither the number of workers nor a resume changes it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tightfit.device.process_state import may_fork
from tightfit.errors import UnsupportedInput
from tightfit.train.data.dataset_info import Samples, TrainingData
from tightfit.train.data.order import BatchOrder


@dataclass(frozen=True, slots=True)
class _Request:
    """One microbatch."""

    step: int
    place: int
    """Among the step's microbatches."""
    numbers: tuple[int, ...]
    """Of its samples."""


class Parts(list[Any]):
    """The microbatches of one step, of one process."""

    def __init__(self, batches: Iterable[Any], sizes: Sequence[int], batch_size: int) -> None:
        super().__init__(batches)
        self.sizes = tuple(sizes)
        """Samples of each microbatch."""
        self.batch_size = batch_size
        """Samples of the step, of all processes."""

    @property
    def is_filler(self) -> bool:
        """There are fewer samples than processes, and this one only goes along, with a sample of another."""
        return not any(self.sizes)


@dataclass(frozen=True, slots=True)
class _Trouble:
    """What a sample's error says; errors of workers travel badly."""

    text: str


class _Built(Dataset[Any]):
    """Samples by `_Request`, in whatever process asks."""

    def __init__(self, data: TrainingData, seed: str) -> None:
        self._data = data
        self._seed = seed

    def __getitems__(self, request: _Request) -> Any:
        with _own_randomness(f"{self._seed}:{request.step}:{request.place}", self._data.is_random):
            return _batch_of(self._data.name, self._data.samples, request.numbers, self._data.collate)


def _as_it_is(batch: Any) -> Any:
    return batch


class BatchLoader:
    """Batches of the steps of a run: for each step, its microbatches on the CPU.

    Args:
        data: where samples come from.
        order: which samples each step has.
        samples_at_a_time: the most samples of a microbatch.
        workers: processes that build batches ahead; 0: none.
        pin_memory: put batches into page-locked memory; see `Device.pins_memory`.
        seed: of what samples draw at random.
        rank, world_size: which of several processes this is; each has its part of every batch.
    """

    def __init__(
        self,
        data: TrainingData,
        order: BatchOrder,
        *,
        samples_at_a_time: int,
        workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._order = order
        self._samples_at_a_time = samples_at_a_time
        self._workers = workers
        self._pin_memory = pin_memory
        self._rank = rank
        self._world_size = world_size
        self._built = _Built(data, f"{seed}" if world_size == 1 else f"{seed}/{rank}")

    def numbers(self, step: int) -> list[tuple[int, ...]]:
        """The numbers of the samples of each microbatch of step ``step``."""
        numbers = self._order.indices(step)
        begin, end = self._part(len(numbers))
        numbers = numbers[begin:end] or numbers[:1]
        size = self._samples_at_a_time
        return [tuple(numbers[start : start + size]) for start in range(0, len(numbers), size)]

    def _sizes(self, step: int, made: list[int]) -> tuple[list[int], int]:
        """Of the samples `made` for each microbatch of step ``step``, those of this process; and those of all."""
        count = len(self._order.indices(step))
        begin, end = self._part(count)
        return made if begin < end else [0] * len(made), count

    def _part(self, count: int) -> tuple[int, int]:
        """Of so many samples, this process's: from the first number up to the second."""
        return count * self._rank // self._world_size, count * (self._rank + 1) // self._world_size

    def microbatches(self, step: int) -> Parts:
        """The microbatches of step ``step`` (the first is 0), made now.

        Raises:
            UnsupportedInput: the samples cannot be read, or put into one batch.
        """
        requests = self._requests(step)
        built = (_checked(self._built.__getitems__(request)) for request in requests)
        return Parts(built, *self._sizes(step, [len(request.numbers) for request in requests]))

    def stream(self, first_step: int, total_steps: int) -> Iterator[Parts]:
        """The microbatches of each step from `first_step` up to `total_steps`.

        Raises:
            UnsupportedInput: as `microbatches`, or a worker has died.
        """
        if not self._workers:
            for step in range(first_step, total_steps):
                yield self.microbatches(step)
            return
        steps = range(first_step, total_steps)
        all_sizes = [self._sizes(step, [len(numbers) for numbers in self.numbers(step)]) for step in steps]
        loader = DataLoader(
            self._built,
            batch_sampler=_Plan(self, first_step, total_steps),  # type: ignore[arg-type]  # of requests, not of lists
            collate_fn=_as_it_is,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            multiprocessing_context=None if may_fork() else "spawn",
            generator=torch.Generator(),  # else it draws from the one that dropout uses
        )
        batches = iter(loader)
        try:
            for sizes, batch_size in all_sizes:
                yield Parts((_checked(_next_of(batches)) for _ in sizes), sizes, batch_size)
        finally:
            del batches  # ends the workers

    def _requests(self, step: int) -> list[_Request]:
        return [_Request(step, place, numbers) for place, numbers in enumerate(self.numbers(step))]


class _Plan:
    """The requests of a run, for `DataLoader`."""

    def __init__(self, loader: BatchLoader, first_step: int, total_steps: int) -> None:
        self._loader = loader
        self._steps = range(first_step, total_steps)

    def __iter__(self) -> Iterator[_Request]:
        for step in self._steps:
            yield from self._loader._requests(step)


def batches_of(
    data: TrainingData, samples: Samples, size: int, rank: int = 0, world_size: int = 1, *, even: bool = False
) -> Iterator[tuple[int | None, Any]]:
    """All samples in their order, in batches of ``size`` on the CPU; the last may be smaller.  Each with its number; of
    several processes, each makes every ``world_size``-th.  With ``even``, all make equally many: a process that would
    have one less makes the first batch again, without a number.
    """
    count = -(-len(samples) // size)
    for turn in range(-(-count // world_size)):
        number: int | None = turn * world_size + rank
        if number is not None and number >= count:
            if not even:
                return
            number = None
        start = (number or 0) * size
        numbers = range(start, min(start + size, len(samples)))
        with _own_randomness(f"held out:{start}", data.is_random):
            batch = _batch_of(data.name, samples, numbers, data.collate)
        yield number, _checked(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; lists become tuples."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(to_device(value, device) for value in batch)
    return batch


def _batch_of(name: str, samples: Samples, numbers: Sequence[int], collate: Any) -> Any:
    built = []
    for number in numbers:
        try:
            built.append(samples[number])
        except UnsupportedInput as problem:
            return _Trouble(str(problem))
        except OSError:
            raise
        except Exception as problem:
            return _Trouble(
                f"sample {number} of {name} cannot be read: {type(problem).__name__}: {problem}. Training needs every "
                f"sample. Correct it, or leave it out of the dataset."
            )
    try:
        return collate(built)
    except (RuntimeError, TypeError, ValueError) as problem:
        shown = f"{list(numbers[:4])}{'...' if len(numbers) > 4 else ''}"
        return _Trouble(
            f"samples {shown} of {name} cannot be put into one batch: {problem}. "
            f"Samples must be tensors, numbers, or tuples and dictionaries of them, all of the same shape; or give the "
            f"dataset an attribute collate, a function of a list of samples."
        )


def _checked(batch: Any) -> Any:
    if isinstance(batch, _Trouble):
        raise UnsupportedInput(batch.text)
    return batch


def _next_of(batches: Iterator[Any]) -> Any:
    try:
        return next(batches)
    except RuntimeError as problem:
        if "DataLoader worker" not in str(problem):
            raise
        raise UnsupportedInput(
            f"a process that loads data has died: {str(problem).splitlines()[0]}. Its memory may have run out, or the "
            f"dataset's code has ended it. Try fewer --workers, or 0, which shows errors where they happen."
        ) from None


@contextmanager
def _own_randomness(key: str, wanted: bool) -> Iterator[None]:
    """Inside, Python's, NumPy's and PyTorch's generators start from ``key``; afterwards they are as they were."""
    if not wanted:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
