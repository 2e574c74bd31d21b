"""Loading batches in the order of the steps, in this process or by workers: the same ones either way.

What a sample draws at random is seeded by its batch alone, so neither the number of workers nor a resume changes it.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tightfit.device.process_state import may_fork
from tightfit.errors import UnsupportedInput, first_line
from tightfit.step.batch import batch_tensors
from tightfit.step.microbatch import Microbatch
from tightfit.train.data.dataset_info import Samples, TrainingData
from tightfit.train.data.order import BatchOrder

_log = logging.getLogger(__name__)

#: How long a worker may take for a batch before a line says so, and how many such lines there are before the run ends.
_PATIENCE_S = 60
_MOST_WAITS = 10


@dataclass(frozen=True, slots=True)
class _Request:
    """One microbatch."""

    step: int
    place: int
    """Among the step's microbatches."""
    numbers: tuple[int, ...]
    """Of its samples."""


@dataclass(frozen=True, eq=False)
class SplitBatch:
    """One process's share of a step's batch, in the parts that are run one after the other."""

    parts: tuple[Any, ...]
    sizes: tuple[int, ...]
    """Samples of each part."""
    batch_size: int
    """Samples of the step, of all processes."""

    @property
    def is_duplicate(self) -> bool:
        """Whether this rank has no sample in a short last batch, and runs one of another rank with weight 0."""
        return not any(self.sizes)


@dataclass(frozen=True, slots=True)
class _SampleError:
    """The message of an error in a sample, which a worker returns: exceptions do not always pickle."""

    text: str


class _Requests(Dataset[Any]):
    """Microbatches by `_Request`, for this process or a worker."""

    def __init__(self, data: TrainingData, seed: str) -> None:
        self._data = data
        self._seed = seed

    def __getitems__(self, request: _Request) -> Any:
        with _seeded_by(f"{self._seed}:{request.step}:{request.place}", self._data.is_random):
            return _batch_of(self._data.name, self._data.samples, request.numbers, self._data.collate)

    def elements(self, numbers: Iterable[int]) -> dict[int, int]:
        """Count the elements of samples, by their numbers."""
        with _seeded_by(f"{self._seed}:sizes", self._data.is_random):
            samples = self._data.samples
            return {n: sum(tensor.numel() for tensor in batch_tensors(samples[n])) for n in numbers}


def _as_it_is(batch: Any) -> Any:
    return batch


class BatchLoader:
    """Loads the batch of each step of a run, split into microbatches, on the CPU.

    Args:
        data: where samples come from.
        order: which samples each step has.
        samples_at_a_time: the most samples of a microbatch.
        workers: processes that load batches ahead; 0: none.
        pin_memory: put batches into memory from which a GPU copies fast.
        seed: of what samples draw at random.
        rank, world_size: which of several processes this is; each has its share of every batch.
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
        self._loaded = _Requests(data, f"{seed}" if world_size == 1 else f"{seed}/{rank}")

    def numbers(self, step: int) -> list[tuple[int, ...]]:
        """Return the numbers of the samples of each microbatch of step ``step``."""
        numbers = self._order.indices(step)
        begin, end = self._share(len(numbers))
        numbers = numbers[begin:end] or numbers[:1]
        size = self._samples_at_a_time
        return [tuple(numbers[start : start + size]) for start in range(0, len(numbers), size)]

    def elements(self, numbers: Iterable[int]) -> dict[int, int]:
        """Count the elements of samples, by their numbers."""
        return self._loaded.elements(numbers)

    def _sizes(self, step: int) -> tuple[tuple[int, ...], int]:
        """Count the samples of each microbatch of step ``step`` that are this process's own, and those of the step."""
        count = len(self._order.indices(step))
        begin, end = self._share(count)
        return tuple(len(numbers) if begin < end else 0 for numbers in self.numbers(step)), count

    def _share(self, count: int) -> tuple[int, int]:
        """Return where this process's share of so many samples begins and ends."""
        return count * self._rank // self._world_size, count * (self._rank + 1) // self._world_size

    def batch(self, step: int) -> SplitBatch:
        """Load the batch of step ``step`` (the first is 0) now, in this process.

        Raises:
            UnsupportedInput: the samples cannot be read, or put into one batch.
        """
        parts = tuple(_checked(self._loaded.__getitems__(request)) for request in self._requests(step))
        return SplitBatch(parts, *self._sizes(step))

    def stream(self, first_step: int, total_steps: int) -> Generator[SplitBatch, None, None]:
        """Load the batch of each step from `first_step` up to `total_steps`.

        Raises:
            UnsupportedInput: as `batch`, or a worker has died.
        """
        if not self._workers:
            for step in range(first_step, total_steps):
                yield self.batch(step)
            return
        all_sizes = [self._sizes(step) for step in range(first_step, total_steps)]
        loader = DataLoader(
            self._loaded,
            batch_sampler=_RequestOrder(self, first_step, total_steps),  # type: ignore[arg-type]  # of requests, not of lists
            collate_fn=_as_it_is,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            multiprocessing_context=None if may_fork() else "spawn",
            timeout=_PATIENCE_S,
            generator=torch.Generator(),  # else it draws from the one that dropout uses
        )
        batches = iter(loader)
        try:
            for step, (sizes, batch_size) in enumerate(all_sizes, first_step + 1):
                yield SplitBatch(tuple(_checked(_next_of(batches, step)) for _ in sizes), sizes, batch_size)
        finally:
            del batches  # ends the workers

    def _requests(self, step: int) -> list[_Request]:
        return [_Request(step, place, numbers) for place, numbers in enumerate(self.numbers(step))]


class _RequestOrder:
    """The requests of a run in their order, for `DataLoader`."""

    def __init__(self, loader: BatchLoader, first_step: int, total_steps: int) -> None:
        self._loader = loader
        self._steps = range(first_step, total_steps)

    def __iter__(self) -> Iterator[_Request]:
        for step in self._steps:
            yield from self._loader._requests(step)


def batches_of(
    data: TrainingData, samples: Samples, size: int, rank: int = 0, world_size: int = 1, *, even: bool = False
) -> Iterator[tuple[int | None, Any]]:
    """Load all samples in their order, in batches of ``size`` on the CPU, each with its number.

    The last batch may be smaller.  Of several processes, each loads every ``world_size``-th one.  With ``even``, all
    load equally many: a process that would have one less loads the first batch again, without a number.
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
        with _seeded_by(f"held out:{start}", data.is_random):
            batch = _batch_of(data.name, samples, numbers, data.collate)
        yield number, _checked(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on ``device``; lists become tuples."""
    if isinstance(batch, Microbatch):
        return Microbatch(to_device(batch.batch, device), batch.weight)
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(to_device(value, device) for value in batch)
    return batch


def batch_of(data: TrainingData, numbers: Sequence[int]) -> Any:
    """Return one batch of samples, by their numbers.

    Raises:
        UnsupportedInput: a sample cannot be read, or they cannot be put into one batch.
    """
    return _checked(_batch_of(data.name, data.samples, numbers, data.collate))


def _batch_of(name: str, samples: Samples, numbers: Sequence[int], collate: Any) -> Any:
    built = []
    for number in numbers:
        try:
            built.append(samples[number])
        except UnsupportedInput as problem:
            return _SampleError(str(problem))
        except OSError:
            raise
        except Exception as problem:
            return _SampleError(
                f"sample {number} of {name} cannot be read: {type(problem).__name__}: {problem}. Training needs every "
                f"sample. Correct it, or leave it out of the dataset."
            )
    try:
        return collate(built)
    except (RuntimeError, TypeError, ValueError) as problem:
        shown = f"{list(numbers[:4])}{'...' if len(numbers) > 4 else ''}"
        return _SampleError(
            f"samples {shown} of {name} cannot be put into one batch: {problem}. "
            f"Samples must be tensors, numbers, or tuples and dictionaries of them, all of the same shape; or give the "
            f"dataset an attribute collate, a function of a list of samples."
        )


def _checked(batch: Any) -> Any:
    if isinstance(batch, _SampleError):
        raise UnsupportedInput(batch.text)
    return batch


def _next_of(batches: Iterator[Any], step: int) -> Any:
    for waits in range(1, _MOST_WAITS + 1):
        try:
            return next(batches)
        except RuntimeError as problem:
            if "DataLoader timed out" in str(problem):
                _log.warning("the data loader's workers have not delivered step %d for %d s", step, waits * _PATIENCE_S)
                continue
            if "DataLoader worker" not in str(problem):
                raise
            raise UnsupportedInput(
                f"a data loader worker has died: {first_line(problem)}. It may have run out of memory, or the "
                f"dataset's code has ended it. Try fewer --workers, or 0, which shows errors where they happen."
            ) from None
    raise UnsupportedInput(
        f"the data loader's workers have not delivered the batch of step {step} in {_MOST_WAITS * _PATIENCE_S} s: they "
        f"hang, or wait for something that does not come. Try --workers 0, which shows where (Ctrl-C there)."
    )


@contextmanager
def _seeded_by(key: str, wanted: bool) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's generators by ``key`` inside the context, and restore them afterwards."""
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
