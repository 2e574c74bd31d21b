"""From settings to objects: the model, its loss, its data and its optimizer, checked before anything long begins."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from recollect.budget import resolve_budget
from recollect.errors import UnsupportedInput
from recollect.train.config import WorkConfig
from recollect.train.data import TrainingData, data_name, load_data
from recollect.train.data.order import BatchOrder, load_batch
from recollect.train.device import resolve_device
from recollect.train.losses import check_fit, choose_loss
from recollect.train.models import Loss, ModelSource, find_model

Config = TypeVar("Config", bound=WorkConfig)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that one training step needs."""

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    data: TrainingData
    order: BatchOrder
    device: torch.device
    budget_bytes: int

    def batch(self, step: int) -> Any:
        """The batch of step ``step`` (the first is 0) on the device."""
        return load_batch(self.data, self.order.indices(step), self.device)


def resolve(config: Config) -> tuple[Config, ModelSource]:
    """``config`` with the model's usual dataset and sequence length filled in, and what the model is."""
    source = find_model(config.model, config.task)
    dataset = config.dataset or source.default_dataset
    if not dataset:
        raise UnsupportedInput(
            f"no dataset is given, and the model {config.model!r} has no usual one. "
            f"Add --dataset: a name of `recollect datasets`, a path, or package.module:factory."
        )
    data_name(dataset)
    resolved = replace(config, dataset=dataset, sequence_length=config.sequence_length or source.sequence_length)
    return resolved, source


def build(config: WorkConfig, source: ModelSource) -> Workload:
    """Build what the resolved ``config`` describes. Seeds every random generator.

    Raises:
        UnsupportedInput: something does not exist or does not fit; nothing has been written then.
    """
    device = resolve_device(config.device)
    budget_bytes = resolve_budget(config.memory, device, name="--memory")
    assert config.dataset is not None
    assert config.sequence_length is not None
    data = load_data(config.dataset, sequence_length=config.sequence_length, arguments=config.dataset_args)
    check_fit(source, data.facts, config.dataset)
    order = BatchOrder(sample_count=len(data.samples), batch_size=config.batch_size, seed=config.seed)
    _seed_everything(config.seed)
    built = source.build(data.facts, config.sequence_length, config.model_args)
    model = built.module.to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UnsupportedInput(
            f"the model {config.model!r} has no trainable parameter, so there is nothing to train. "
            f"Set requires_grad on the parameters that training should change."
        )
    return Workload(
        model=model,
        loss=choose_loss(built, data.facts),
        optimizer=torch.optim.AdamW(parameters, lr=config.lr),
        data=data,
        order=order,
        device=device,
        budget_bytes=budget_bytes,
    )


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
