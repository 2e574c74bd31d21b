"""What a run is made of: the one place where the settings of `train`, `plan`, `frontier` and `verify` are declared.

The command line, the YAML file and the run folder's ``config.yaml`` are all derived from these dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import yaml

from recollect.errors import UnsupportedInput
from recollect.train.models import Task

GradCheckpoint = Literal["auto", "full", "off"]


@dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """One training step: of which model, on which data, where, and inside which memory."""

    model: str = "gpt"
    """A name of `recollect models`, transformers:CONFIG.json (or folder), or package.module:factory"""
    model_args: Mapping[str, object] = field(default_factory=dict)
    """Settings of the model, as key=value"""
    task: Task | None = None
    """What a transformers: model is trained for, where its config does not say"""
    dataset: str | None = None
    """A name of `recollect datasets`, a text file or folder, or package.module:factory (default: the model's usual)"""
    dataset_args: Mapping[str, object] = field(default_factory=dict)
    """Arguments of a dataset's factory, as key=value"""
    sequence_length: int | None = None
    """Tokens or time steps in a sample (default: the model's usual)"""
    batch_size: int = 16
    """Samples in a batch"""
    lr: float = 1e-3
    """Learning rate of AdamW"""
    seed: int = 0
    """Decides the first weights, the order of the data and dropout"""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: CUDA where there is one"""
    memory: str = "auto"
    """The budget: 8GiB, 8GB, 75% of the device's memory, or auto: what the device has free"""

    def __post_init__(self) -> None:
        self._require_positive("batch_size", "sequence_length")
        if not self.lr > 0:
            raise UnsupportedInput(
                f"the learning rate is {self.lr}, so the weights would not move towards a smaller loss. "
                f"Give a number above zero: --lr 1e-3."
            )
        if not 0 <= self.seed < 2**63:
            raise UnsupportedInput(
                f"the seed is {self.seed}, but the generators take 0 to 2**63 - 1. Give a --seed in that range."
            )

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnsupportedInput(
                    f"{name.replace('_', ' ')} is {value}, but at least 1 is needed. "
                    f"Give --{name.replace('_', '-')} a whole number above zero."
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(WorkConfig):
    """A training run."""

    epochs: int | None = None
    """Passes over the data (default: 1, unless --steps is given)"""
    steps: int | None = None
    """Optimizer steps in all, resumed ones included"""
    grad_checkpoint: GradCheckpoint = "auto"
    """auto: recompute as little as the budget allows; full: recompute all that can be; off: never"""
    reference_memory: str | None = None
    """What the proof may use to run the plain step for comparison (default: the budget)"""
    log_every: int = 10
    """Steps between two logged steps; a logged step's memory is measured, which makes it slower"""
    save_every: int = 100
    """Steps between two checkpoints; the last step is always saved"""
    root_path: str = "runs"
    """The run's folder is ROOT_PATH/DATASET/MARK"""
    mark: str | None = None
    """Name of this run (default: the model's name)"""
    resume: str | None = None
    """auto (also without a value): continue this run if it was begun; PATH: continue from that checkpoint"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("epochs", "steps", "log_every", "save_every")
        if self.epochs is not None and self.steps is not None:
            raise UnsupportedInput(
                f"both epochs ({self.epochs}) and steps ({self.steps}) are given, which may contradict each other. "
                f"Give one of --epochs and --steps."
            )


#: Settings that say how a command is called, not what the run is: they do not enter ``config.yaml``.
PER_CALL = ("resume",)


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML that `recollect train --config-file` takes."""
    settings: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name not in PER_CALL:
            settings[entry.name] = dict(value) if isinstance(value, Mapping) else value
    text: str = yaml.safe_dump(settings, sort_keys=False)
    return text
