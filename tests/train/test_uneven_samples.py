"""Show 101 samples to 2, 3 and 8 processes once an epoch each, in another order each time, with every process in every
step: "hang at the last batch; same order each epoch".

See https://github.com/pytorch/pytorch/issues/33148 and https://github.com/pytorch/pytorch/issues/31771.

A run that ends with such a batch is in tests/train/launch/test_runs.py.
"""

from __future__ import annotations

import pytest
import torch

from tightfit.train.data.dataset_info import DataFacts, TrainingData
from tightfit.train.data.loader import BatchLoader, batches_of
from tightfit.train.data.order import BatchOrder

DATA = TrainingData(
    name="numbers",
    samples=[torch.tensor(number) for number in range(101)],  # type: ignore[arg-type]  # a list takes slices, too
    facts=DataFacts(kind="custom"),
    fingerprint="",
    description="",
)


def loaders(world_size: int) -> tuple[BatchOrder, list[BatchLoader]]:
    order = BatchOrder(sample_count=101, batch_size=8, seed=0)
    return order, [
        BatchLoader(DATA, order, samples_at_a_time=8, rank=rank, world_size=world_size) for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_sample_once_an_epoch(world_size: int) -> None:
    order, ranks = loaders(world_size)
    epochs = []
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            batches = [loader.batch(step) for loader in ranks]
            assert all(len(batch.parts) > 0 for batch in batches)
            own = [part for batch in batches if not batch.is_duplicate for part in batch.parts]
            numbers = [int(number) for part in own for number in part]
            assert numbers == order.indices(step)
            seen += numbers
        assert sorted(seen) == list(range(101))
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_only_a_process_without_samples_runs_a_duplicate() -> None:
    order, ranks = loaders(8)
    last = order.steps_per_epoch - 1
    assert len(order.indices(last)) == 5
    assert sum(loader.batch(last).is_duplicate for loader in ranks) == 3
    assert not any(loader.batch(0).is_duplicate for loader in ranks)


def test_an_evaluation_that_needs_all_processes_has_as_many_batches_in_each() -> None:
    """101 samples in 13 batches of 8 on 2 processes: the second one makes the first batch again, uncounted."""
    uneven = [list(batches_of(DATA, DATA.samples, 8, rank, 2)) for rank in range(2)]
    assert [len(found) for found in uneven] == [7, 6]
    even = [list(batches_of(DATA, DATA.samples, 8, rank, 2, even=True)) for rank in range(2)]
    assert [len(found) for found in even] == [7, 7]
    assert [number for found in even for number, _ in found] == [*range(0, 13, 2), *range(1, 13, 2), None]
    assert torch.equal(even[1][-1][1], even[0][0][1])
