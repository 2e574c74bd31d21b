"""From settings to objects: the model, its task, its data and its optimizer, checked before anything long begins."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tightfit.device import device_for
from tightfit.device.budget import resolve_budget
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.errors import UnsupportedInput
from tightfit.step.batch import batch_tensors
from tightfit.step.step import Step
from tightfit.train.config import WorkConfig
from tightfit.train.data import DataOptions, TrainingData, data_name, load_data
from tightfit.train.data.loader import BatchLoader, Parts, to_device
from tightfit.train.data.order import BatchOrder
from tightfit.train.data.rows import Columns
from tightfit.train.data.tokens import load_tokens
from tightfit.train.device import resolve_device
from tightfit.train.models import Loss, ModelSource, find_model
from tightfit.train.optimizers import make_optimizer
from tightfit.train.parallel.fsdp import can_be_cast, check_can_shard, shard
from tightfit.train.precision import autocast_dtype
from tightfit.train.tasks import Task, choose_task
from tightfit.train.tasks.choose import check_fit

Config = TypeVar("Config", bound=WorkConfig)


class SharedLoss:
    """A task's loss, times a microbatch's share of its batch: so that gradients add up to those of the whole batch."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.share: float | None = None
        """None: the batch is not split, and the loss is what it is."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss, scaled."""
        value = self._loss(model, batch)
        return value if self.share is None else value * self.share


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that one training step needs."""

    model: nn.Module
    task: Task
    loss: SharedLoss
    """The task's, of the microbatch that is run."""
    optimizer: torch.optim.Optimizer
    data: TrainingData
    order: BatchOrder
    loader: BatchLoader
    device: torch.device
    autocast: torch.dtype | None
    clip_norm: float | None
    budget_bytes: int
    group: ProcessGroup = SINGLE_PROCESS
    """The processes of the run."""

    @property
    def accumulation_steps(self) -> int:
        """Microbatches in a full batch."""
        return len(self.loader.numbers(0))

    def microbatch(self, step: int, place: int = 0) -> Any:
        """One microbatch of step ``step`` (the first is 0) on the device; the loss is set to its share."""
        parts = self.loader.microbatches(step)
        self.loss.share = self.shares(parts)[place]
        return to_device(parts[place], self.device)

    def shares(self, parts: Parts) -> list[float | None]:
        """Each microbatch's share of its batch, times the number of processes; None where batches are not split.

        A batch that is too small to be split still has a share of 1, so that its step is like that of the others.
        The processes ask each other only where it takes more than the numbers of samples, which all of them know.
        """
        if self.accumulation_steps == 1 and self.group.is_single_process:
            return [None] * len(parts)
        total: float
        weights: Sequence[float]
        if self.task.samples_weigh_alike:
            weights, total = parts.sizes, parts.batch_size
        else:
            weights = [0.0 if parts.is_filler else self.task.weight(part) for part in parts]
            (total,) = self.group.all_reduce_sum([sum(weights)])
        if not total > 0:
            raise UnsupportedInput(
                "a batch has no element that its loss is a mean over (no token to predict, no sample), so there is no "
                "gradient. Leave such samples out of the dataset."
            )
        # What each process has is averaged over them in the end, not added up.
        return [weight / total * self.group.world_size for weight in weights]

    def bytes_beside(self, parts: list[Any], place: int) -> int:
        """Bytes of the device that the other microbatches of a batch take while one of them runs."""
        if not device_for(self.device).is_host:
            return 0  # the others wait in host memory
        return sum(t.nbytes for other, part in enumerate(parts) if other != place for t in batch_tensors(part))

    def spec(self) -> Step:
        """The step, as the verbs take it."""
        return Step(
            loss=self.loss,
            optimizer=self.optimizer,
            accumulation_steps=self.accumulation_steps,
            autocast=self.autocast,
            clip_norm=self.clip_norm,
        )


def resolve(config: Config) -> tuple[Config, ModelSource]:
    """``config`` with the model's usual dataset and sequence length filled in, and what the model is."""
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
    """How the resolved ``config`` reads data for its model."""
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
    """The data, in batches as the task needs them."""
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
    """Build what the resolved ``config`` describes, for one of the processes of ``group``, on ``device`` (default: the
    configuration's). Seeds every random generator.  ``sharded``: the processes share the parameters out.

    Raises:
        UnsupportedInput: something does not exist or does not fit; nothing has been written then.
    """
    device = device or resolve_device(config.device)
    autocast = autocast_dtype(config.precision, device)
    if sharded:
        check_can_shard(config.optimizer, autocast)
    budget_bytes = resolve_budget(config.memory, device, name="--memory")
    assert config.dataset is not None
    assert config.sequence_length is not None
    data = load_data(config.dataset, data_options(config, source))
    check_fit(source, data.facts, config.dataset)
    if config.batch_size < group.world_size:
        raise UnsupportedInput(
            f"the batch has {config.batch_size} samples, but there are {group.world_size} processes to share them. "
            f"Give a larger --batch-size, or start fewer processes."
        )
    order = BatchOrder(sample_count=len(data.samples), batch_size=config.batch_size, seed=config.seed)
    seed_everything(config.seed)
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
        loss=SharedLoss(task.loss),
        optimizer=optimizer,
        data=data,
        order=order,
        loader=loader,
        device=device,
        autocast=autocast,
        clip_norm=config.clip_norm,
        budget_bytes=budget_bytes,
        group=group,
    )


def seed_of(seed: int, rank: int, step: int) -> int:
    """For what one process draws at random from a step on."""
    digest = hashlib.sha256(f"{seed}:rank {rank}:step {step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Of all random generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
