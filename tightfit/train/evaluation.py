"""Evaluating the model on data that it is not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from tightfit.device import device_for
from tightfit.device.memory import measure_peak, resident_bytes
from tightfit.distributed.fsdp import ensure_sharded, is_sharded
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.errors import UnsupportedInput
from tightfit.train.config import TrainConfig
from tightfit.train.data import load_data
from tightfit.train.data.dataset_info import Samples, TrainingData
from tightfit.train.data.loader import batches_of, to_device
from tightfit.train.data.split import spread
from tightfit.train.models import ModelSource
from tightfit.train.tasks import Task
from tightfit.train.tasks.task import Sums
from tightfit.train.workload import Workload, data_options, for_task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics over the evaluation set."""

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
        """Evaluate in eval mode, without gradients and without touching random generators or statistics.

        Several processes share the batches, and each adds up what all found, in the order of the batches.  Each forward
        of a sharded model needs all processes, so that all make equally many.
        """
        found: list[tuple[int, Sums]] = []
        peak_bytes = 0
        group = self.group
        with evaluating(self.model), torch.no_grad():
            for number, batch in batches_of(
                self.data, self.samples, self.batch_size, group.rank, group.world_size, even=is_sharded(self.model)
            ):
                moved = to_device(batch, self.device)
                if not peak_bytes:
                    resident = resident_bytes(self.model, moved, self.optimizer)
                    sums, peak_bytes = measure_peak(
                        partial(self._measure, moved), resident, self.device, from_empty=False
                    )
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode inside the context; afterwards each is in its own, and no weights are gathered."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        ensure_sharded(model)
        for module, training in was_training.items():
            module.training = training


def make_evaluator(config: TrainConfig, source: ModelSource, work: Workload) -> Evaluator | None:
    """Return the evaluator, or None if the dataset has no held-out split.

    Raises:
        UnsupportedInput: an evaluation is asked for, but there is nothing to evaluate on.
    """
    data, samples = work.data, work.data.held_out
    if config.eval_dataset is not None:
        options = replace(data_options(config, source), arguments={})
        data = for_task(load_data(config.eval_dataset, options), work.task)
        if data.facts.kind != work.data.facts.kind:
            raise UnsupportedInput(
                f"--eval-dataset {config.eval_dataset} gives {data.facts.kind}, but the model is trained on "
                f"{work.data.facts.kind}. Evaluate on data of the same kind."
            )
        samples = data.samples
    if samples is None:
        for name, value in (("eval-every", config.eval_every), ("early-stop", config.early_stop)):
            if value is not None:
                raise UnsupportedInput(
                    f"--{name} {value} asks for evaluations, but {config.dataset} holds nothing out to evaluate on. "
                    f"Add --eval-dataset, or let the dataset's factory return a pair: (training, held out)."
                )
        return None
    return Evaluator(
        model=work.model,
        task=work.task,
        data=data,
        samples=spread(samples, config.eval_samples),
        batch_size=config.samples_at_a_time(work.group.world_size),
        group=work.group,
        device=work.device,
        autocast=work.autocast,
        optimizer=work.optimizer,
    )


def loss_of_first_batch(work: Workload) -> float:
    """Return the loss on the run's first batch, without dropout and without touching statistics."""
    total = 0.0
    with evaluating(work.model), torch.no_grad():
        for microbatch in work.microbatches(0):
            with device_for(work.device).autocast(work.autocast):
                loss = work.task.loss(work.model, to_device(microbatch.batch, work.device))
                total += microbatch.weighted(loss).item()
    return work.group.all_reduce_sum([total])[0] / work.group.world_size
