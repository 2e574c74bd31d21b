"""Judging the model on data that it is not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tightfit.device import device_for
from tightfit.device.memory import measure_peak, resident_bytes
from tightfit.distributed.fsdp import ensure_sharded, is_sharded
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.train.data.dataset_info import Samples, TrainingData
from tightfit.train.data.loader import batches_of, to_device
from tightfit.train.tasks import Task
from tightfit.train.tasks.task import Sums


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics over all held-out samples."""

    metrics: dict[str, float]
    samples: int
    peak_bytes: int
    """Of the first batch, which is a full one."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a model as it is at the moment."""

    model: nn.Module
    task: Task
    data: TrainingData
    samples: Samples
    batch_size: int
    device: torch.device
    autocast: torch.dtype | None
    optimizer: torch.optim.Optimizer
    group: ProcessGroup = SINGLE_PROCESS

    def evaluate(self) -> Evaluation:
        """In eval mode, without gradients and without touching random generators or statistics.

        Several processes share the batches; what each found is added up in the order of the batches, by all of them.
        Where they share the model's parameters, too, each forward needs all of them: all make equally many.
        """
        found: list[tuple[int, Sums]] = []
        peak_bytes = 0
        group = self.group
        with judging(self.model), torch.no_grad():
            for number, batch in batches_of(
                self.data, self.samples, self.batch_size, group.rank, group.world_size, even=is_sharded(self.model)
            ):
                moved = to_device(batch, self.device)
                if not peak_bytes:
                    resident = resident_bytes(self.model, moved, self.optimizer)
                    sums, peak_bytes = measure_peak(partial(self._measure, moved), resident, self.device)
                else:
                    sums = self._measure(moved)
                if number is not None:
                    found.append((number, sums))
        totals: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        everyones = self.group.all_gather((found, peak_bytes))
        for _, sums in sorted((entry for entries, _ in everyones for entry in entries), key=lambda entry: entry[0]):
            for name, (total, count) in sums.items():
                totals[name] += total  # type: ignore[assignment]  # Counter of floats
                counts[name] += count  # type: ignore[assignment]  # of floats
        means = {name: totals[name] / counts[name] for name in totals if counts[name]}
        return Evaluation(
            metrics=self.task.summarise(means),
            samples=len(self.samples),
            peak_bytes=max(peak for _, peak in everyones),
        )

    def _measure(self, batch: object) -> Sums:
        if self.autocast is None:
            return self.task.measure(self.model, batch)
        with device_for(self.device).autocast(self.autocast):
            return self.task.measure(self.model, batch)


@contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in eval mode; afterwards each in its own, and no weights gathered."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        ensure_sharded(model)
        for module, training in was_training.items():
            module.training = training
