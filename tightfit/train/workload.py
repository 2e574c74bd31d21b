"""From settings to objects: the model, its task, its data and its optimizer, all checked."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.errors import UnsupportedInput
from tightfit.step.batch import batch_tensors
from tightfit.step.exclude import excluded_paths
from tightfit.step.microbatch import Microbatch
from tightfit.step.step import Step
from tightfit.train.config import WorkConfig
from tightfit.train.data import DataOptions, TrainingData, data_name, load_data
from tightfit.train.data.loader import BatchLoader, SplitBatch, to_device
from tightfit.train.data.order import BatchOrder
from tightfit.train.data.rows import Columns
from tightfit.train.data.tokens import load_tokens
from tightfit.train.device import resolve_device
from tightfit.train.models import ModelSource, find_model
from tightfit.train.models.building import building
from tightfit.train.optimizers import make_optimizer
from tightfit.train.parallel.fsdp import can_be_cast, check_can_shard, shard
from tightfit.train.precision import autocast_dtype
from tightfit.train.random_state import seed_everything, seed_of
from tightfit.train.settings import LARGEST_BATCH
from tightfit.train.tasks import Task, choose_task
from tightfit.train.tasks.choose import check_fit

#: The loss of the microbatch before, and the sum so far.
_LOSSES_BYTES = 16

ConfigT = TypeVar("ConfigT", bound=WorkConfig)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that one training step needs."""

    model: nn.Module
    task: Task
    optimizer: torch.optim.Optimizer
    data: TrainingData
    order: BatchOrder
    loader: BatchLoader
    device: torch.device
    autocast: torch.dtype | None
    clip_norm: float | None
    budget: Budget
    excluded: tuple[str, ...] = ()
    """Paths of the modules that no plan touches."""
    group: ProcessGroup = SINGLE_PROCESS
    """The processes of the run."""

    @property
    def accumulation_steps(self) -> int:
        """Microbatches in a full batch."""
        return len(self.loader.numbers(0))

    def microbatch(self, step: int) -> Microbatch:
        """Return the first microbatch of step ``step`` (the first is 0), on the device."""
        first: Microbatch = to_device(self.microbatches(step)[0], self.device)
        return first

    def microbatches(self, step: int) -> list[Microbatch]:
        """Return the microbatches of step ``step`` (the first is 0), in host memory.  All processes call this."""
        return self._weighted(self.loader.batch(step))

    def stream(self, first_step: int, total_steps: int) -> Generator[list[Microbatch], None, None]:
        """Yield the microbatches of each step from `first_step` up to `total_steps`; `close` ends the workers."""
        with closing(self.loader.stream(first_step, total_steps)) as batches:
            for batch in batches:
                yield self._weighted(batch)

    def _weighted(self, batch: SplitBatch) -> list[Microbatch]:
        """Weigh each microbatch by its share of the batch, times the number of processes; None: batches are not split.

        A batch that is too small to be split still has a weight of 1, so that its step is like that of the others.
        An all-reduce is needed only where the numbers of samples, which all processes know, do not suffice.
        """
        if self.accumulation_steps == 1 and self.group.is_single_process:
            return [Microbatch(part) for part in batch.parts]
        total: float
        weights: Sequence[float]
        if self.task.samples_weigh_alike:
            weights, total = batch.sizes, batch.batch_size
        else:
            weights = [0.0 if batch.is_duplicate else self.task.weight(part) for part in batch.parts]
            (total,) = self.group.all_reduce_sum([sum(weights)])
        if not total > 0:
            raise UnsupportedInput(
                "a batch has no element that its loss is a mean over (no token to predict, no sample), so there is no "
                "gradient. Leave such samples out of the dataset."
            )
        # What each process has is averaged over them in the end, not added up.
        shares = [weight / total * self.group.world_size for weight in weights]
        return [Microbatch(part, share) for part, share in zip(batch.parts, shares, strict=True)]

    def bytes_beside(self, microbatches: Sequence[Microbatch], place: int) -> int:
        """Return what the other microbatches of a batch and their losses take on the device while one of them runs."""
        if not device_for(self.device).is_host or len(microbatches) == 1:
            return 0  # the others wait in host memory
        others = [one for other, one in enumerate(microbatches) if other != place]
        return sum(tensor.nbytes for tensor in batch_tensors(others)) + _LOSSES_BYTES

    def spec(self) -> Step:
        """Return the step as the four verbs take it."""
        return Step(
            loss=self.task.loss,
            optimizer=self.optimizer,
            accumulation_steps=self.accumulation_steps,
            autocast=self.autocast,
            clip_norm=self.clip_norm,
            excluded=self.excluded,
        )


def resolve(config: ConfigT) -> tuple[ConfigT, ModelSource]:
    """Fill in the model's usual dataset and sequence length, and find the model.

    Raises:
        UnsupportedInput: there is no such model or dataset; or the batch is to be as large as fits.
    """
    if config.batch_size == LARGEST_BATCH:
        raise UnsupportedInput(
            "--batch-size max is asked for, which is found out where a training begins, in one process. Ask `tightfit "
            "grow` for the number with the same flags, and write that."
        )
    source = find_model(config.model, config.task)
    dataset = config.dataset or source.default_dataset
    if not dataset:
        raise UnsupportedInput(
            f"no dataset is given, and the model {config.model!r} has no usual one. "
            f"Add --dataset: a name of `tightfit datasets`, a path, or package.module:factory."
        )
    data_name(dataset)
    resolved = replace(config, dataset=dataset, sequence_length=config.sequence_length or source.sequence_length)
    return resolved, source


def data_options(config: WorkConfig, source: ModelSource) -> DataOptions:
    """Return how the resolved ``config`` reads data for its model."""
    assert config.sequence_length is not None
    return DataOptions(
        sequence_length=config.sequence_length,
        accepts=source.accepts,
        packed=config.packing == "on",
        tokens=load_tokens(config.tokenizer, source.folder),
        columns=Columns(text=config.text_column, label=config.label_column, target=config.target_column),
        image_size=config.image_size,
        arguments=config.dataset_args,
    )


def for_task(data: TrainingData, task: Task) -> TrainingData:
    """Return the data with batches made as the task needs them."""
    if task.collate is None:
        return data
    return replace(data, collate=task.collate, is_random=data.is_random or task.is_random)


def build(
    config: WorkConfig,
    source: ModelSource,
    group: ProcessGroup = SINGLE_PROCESS,
    device: torch.device | None = None,
    *,
    sharded: bool = False,
) -> Workload:
    """Build what the resolved ``config`` describes, and seed every random generator.

    Args:
        config: the settings.
        source: the model.
        group: the processes of the run, of which this is one.
        device: of this process; by default the configuration's.
        sharded: the parameters are sharded over the processes.

    Raises:
        UnsupportedInput: something does not exist or does not fit; nothing has been written then.
    """
    device = device or resolve_device(config.device)
    autocast = autocast_dtype(config.precision, device)
    if sharded:
        check_can_shard(config.optimizer, autocast)
    budget = Budget.of(config.memory, device, name="--memory")
    assert config.dataset is not None
    assert config.sequence_length is not None
    data = load_data(config.dataset, data_options(config, source))
    check_fit(source, data.facts, config.dataset)
    if config.batch_size < group.world_size:
        raise UnsupportedInput(
            f"the batch has {config.batch_size} samples, but there are {group.world_size} processes, and each needs at "
            f"least one. Give a larger --batch-size, or start fewer processes."
        )
    order = BatchOrder(sample_count=len(data.samples), batch_size=config.batch_size, seed=config.seed)
    seed_everything(config.seed)
    with building(f"--model {source.name}") if source.accepts else nullcontext():  # a factory's code is the user's
        built = source.build(data.facts, config.sequence_length, config.model_args)
    model = built.module.to(device).train()
    if sharded:
        by_fsdp = autocast if can_be_cast(model) else None
        shard(model, group, device, by_fsdp)
        autocast = None if by_fsdp is not None else autocast
    if group.rank > 0:  # the same weights everywhere, but not the same dropout
        seed_everything(seed_of(config.seed, group.rank, 0))
    task = choose_task(source, built, data.facts)
    data = for_task(data, task)
    optimizer = make_optimizer(
        config.optimizer,
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        beta2=config.beta2,
    )
    loader = BatchLoader(
        data,
        order,
        samples_at_a_time=config.samples_at_a_time(group.world_size),
        workers=config.workers,
        pin_memory=device_for(device).pins_memory,
        seed=config.seed,
        rank=group.rank,
        world_size=group.world_size,
    )
    return Workload(
        model=model,
        task=task,
        optimizer=optimizer,
        data=data,
        order=order,
        loader=loader,
        device=device,
        autocast=autocast,
        clip_norm=config.clip_norm,
        budget=budget,
        excluded=excluded_paths(model, config.exclude),
        group=group,
    )
