"""Finding the largest microbatch of a run, and naming it where it does not fit the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tightfit.errors import BudgetInfeasible
from tightfit.step.batch import describe_batch
from tightfit.train.data.dataset_info import TrainingData
from tightfit.train.data.loader import BatchLoader
from tightfit.train.failures import shown_samples

#: Samples whose size is looked at, where it is not known; of more, as many are looked at, evenly spaced.
MOST_SAMPLES = 20_000


@dataclass(frozen=True, kw_only=True)
class LargestMicrobatch:
    """The largest microbatch of a run."""

    step: int
    """The first is 0."""
    place: int
    """Among the step's microbatches."""
    numbers: tuple[int, ...]
    """Of its samples."""
    is_bound: bool
    """Whether every sample's size was looked at, so that no batch of the run is larger."""


class BatchDoesNotFit(BudgetInfeasible):
    """A batch of the run has no plan within the budget; the message names it."""

    def __init__(self, problem: BudgetInfeasible, what: str) -> None:
        super().__init__(
            problem.required_bytes,
            problem.budget_bytes,
            problem.where,
            problem.breakdown,
            switched_off=problem.switched_off,
            unproven=problem.unproven,
        )
        self.args = (f"{self.args[0]} {what}",)


def largest_microbatch(data: TrainingData, loader: BatchLoader, first_step: int, total_steps: int) -> LargestMicrobatch:
    """Find the microbatch with the most elements once it is padded: its samples times the largest of them.

    Where samples are all alike, that is the first full one.  Else the samples are looked at, once.
    """
    steps = range(first_step, total_steps)
    if not data.sizes_vary:
        place, step = 0, max(steps[:2], key=lambda step: len(loader.numbers(step)[0]))
        return LargestMicrobatch(step=step, place=place, numbers=loader.numbers(step)[0], is_bound=True)
    sizes, stride = _sizes(data, loader)
    best: tuple[int, LargestMicrobatch] | None = None
    unseen = set(sizes)
    for step in steps:
        for place, numbers in enumerate(loader.numbers(step)):
            elements = len(numbers) * max((sizes.get(number, 0) for number in numbers), default=0)
            if best is None or elements > best[0]:
                best = elements, LargestMicrobatch(step=step, place=place, numbers=numbers, is_bound=stride == 1)
            unseen.difference_update(numbers)
        if not unseen:  # later epochs mix the same samples anew: none of their batches has a larger sample
            break
    assert best is not None
    return best[1]


def largest_samples(data: TrainingData, loader: BatchLoader) -> Sequence[int]:
    """Return the numbers of the samples that were looked at, the largest first: no batch needs more than the first."""
    if not data.sizes_vary:
        return range(len(data.samples))
    sizes, _ = _sizes(data, loader)
    return sorted(sizes, key=lambda number: -sizes[number])


def _sizes(data: TrainingData, loader: BatchLoader) -> tuple[dict[int, int], int]:
    """Count the elements of samples, and tell which they are: every so many."""
    stride = -(-len(data.samples) // MOST_SAMPLES)
    return loader.elements(range(0, len(data.samples), stride)), stride


@contextmanager
def naming_batch(batch: object, largest: LargestMicrobatch) -> Iterator[None]:
    """Make a `BudgetInfeasible` that is raised inside name the batch that it is about."""
    try:
        yield
    except BatchDoesNotFit:
        raise
    except BudgetInfeasible as problem:
        raise BatchDoesNotFit(
            problem,
            f"It is for the batch of step {largest.step + 1}, the largest of the run"
            f"{'' if largest.is_bound else ' among the samples that were looked at'}: "
            f"{describe_batch(batch)}, samples {shown_samples(largest.numbers)}. To run fewer samples at a time "
            f"without changing the training, add --microbatch-size.",
        ) from None
