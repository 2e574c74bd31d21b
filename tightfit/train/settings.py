"""The settings of a run, group by group.  The command line, YAML files and ``config.yaml`` are derived from these."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tightfit.errors import UnsupportedInput
from tightfit.train.models import TransformersTask
from tightfit.train.optimizers import OptimizerName
from tightfit.train.precision import Precision
from tightfit.train.schedules import ScheduleName

#: ``--batch-size max``: as many samples as fit the budget. Whoever trains finds out how many those are.
LARGEST_BATCH = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all groups of settings."""

    TITLE: ClassVar[str] = ""
    """Heading of the group in ``--help``."""

    def __post_init__(self) -> None:
        """Check the values; each group calls this of the next one."""

    def _require(self, least: float, *names: str) -> None:
        """Raise `UnsupportedInput` unless each named setting is None or at least `least`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                wanted = "at least 1" if least == 1 else "zero or more"
                raise UnsupportedInput(
                    f"--{name.replace('_', '-')} is {value}, but it must be {wanted}. Give such a number."
                )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which model."""

    TITLE = "model"

    model: str = "gpt"
    """A name of `tightfit models`, transformers:CONFIG.json (or folder), or package.module:factory"""
    model_args: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the model, as key=value"""
    task: TransformersTask | None = None
    """What a transformers: model is trained for, if its config does not say"""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Which data, and how it is split into steps."""

    TITLE = "data"

    dataset: str | None = None
    """A name of `tightfit datasets`, a path (text, CSV, JSONL, a folder of text or of images by class), or
    package.module:factory (default: the model's usual)"""
    dataset_args: Mapping[str, object] = field(default_factory=dict)
    """Arguments of a dataset's factory, as key=value"""
    sequence_length: int | None = None
    """Tokens or time steps per sample (default: the model's usual)"""
    tokenizer: str | None = None
    """A tokenizer.json or a folder that holds one (default: the model folder's own, else bytes)"""
    packing: Literal["on", "off"] = "on"
    """Text for language models: concatenate documents, and cut that into sequences of equal length; off: each document
    (a file, a row of a table) is its own sample, and shorter ones are padded"""
    text_column: str | None = None
    """Name of the table's text (source) column (default: found by its name)"""
    label_column: str | None = None
    """Name of the table's class column (default: found by its name)"""
    target_column: str | None = None
    """Name of the table's target text column (default: found by its name)"""
    image_size: int | None = None
    """Height and width of a folder's images, in pixels (default: 224)"""
    workers: int = 0
    """Data loader worker processes; 0: load in the training process"""
    batch_size: int = field(default=16, metadata={"words": {"max": LARGEST_BATCH}})
    """Samples per optimizer step, over all processes; max (to train in one): the most that fit"""
    microbatch_size: int | None = None
    """Samples per forward and backward, if the batch is to be split (default: the whole batch)"""
    accumulation_steps: int | None = None
    """Microbatches per optimizer step, instead of --microbatch-size"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "batch_size", "sequence_length", "image_size", "microbatch_size", "accumulation_steps")
        self._require(0, "workers")
        if self.microbatch_size is not None and self.accumulation_steps is not None:
            raise UnsupportedInput(
                f"both --microbatch-size {self.microbatch_size} and --accumulation-steps {self.accumulation_steps} are "
                f"given, which may contradict each other. Give one of them."
            )
        for name, value in (("microbatch-size", self.microbatch_size), ("accumulation-steps", self.accumulation_steps)):
            if value is not None and value > self.batch_size:
                raise UnsupportedInput(
                    f"--{name} is {value}, but the batch has only {self.batch_size} samples to split. "
                    f"Give a number up to {self.batch_size}, or a larger --batch-size."
                )

    def samples_at_a_time(self, world_size: int = 1) -> int:
        """Return the samples of a full microbatch of one process."""
        samples = -(-self.batch_size // world_size)
        if self.accumulation_steps is not None:
            return -(-samples // self.accumulation_steps)
        return min(self.microbatch_size or samples, samples)


@dataclass(frozen=True, kw_only=True)
class StepSettings(Settings):
    """How a step changes the weights."""

    TITLE = "optimization"

    optimizer: OptimizerName = "adamw"
    """Which of PyTorch's optimizers"""
    lr: float = 1e-3
    """Peak learning rate"""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and other vectors are never decayed"""
    momentum: float = 0.9
    """Momentum of sgd"""
    beta2: float = 0.999
    """Second beta of adamw and adam"""
    clip_norm: float | None = None
    """Clip the total norm of the gradients to this"""
    precision: Precision = "fp32"
    """fp32; bf16: autocast; fp16: autocast with a loss scaler, on CUDA only"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lr < float("inf"):
            raise UnsupportedInput(
                f"--lr is {self.lr}, so the loss would not fall. Give a finite number above zero, e.g. --lr 1e-3."
            )
        self._require(0, "weight_decay")
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UnsupportedInput(
                    f"--{name} is {getattr(self, name)}, but it must be in [0, 1), or the average of past gradients "
                    f"would not decay. Give such a number, e.g. --{name} 0.9."
                )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UnsupportedInput(
                f"--clip-norm is {self.clip_norm}, so every gradient would become zero. "
                f"Give a number above zero, e.g. 1.0, or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """Inside which memory."""

    TITLE = "memory"

    memory: str = "auto"
    """Budget: 8GiB, 75% of the device, 8GiB+context (of a GPU), or auto: all that is free"""
    exclude: tuple[str, ...] = ()
    """Leave the modules whose path matches untouched, e.g. layers.*.attn; may be given several times"""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Where, and how repeatable."""

    TITLE = "device"

    device: str = "auto"
    """cpu, cuda, cuda:1, auto, or, to plan for: one of `tightfit devices`, cuda:24GiB"""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout"""
    deterministic: bool = False
    """Use deterministic PyTorch operations only, and fail where there is none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise UnsupportedInput(
                f"--seed is {self.seed}, but random generators take 0 to 2**63 - 1. Give a number in that range."
            )


@dataclass(frozen=True, kw_only=True)
class LengthSettings(Settings):
    """How long, how the learning rate moves, and what becomes of bad steps."""

    TITLE = "training"

    epochs: int | None = None
    """Passes over the data (default: 1, unless --steps is given)"""
    steps: int | None = None
    """Optimizer steps in all, those before a resume included"""
    schedule: ScheduleName = "constant"
    """How the learning rate falls after the warm-up, to --min-lr-ratio of its peak at the last step"""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak"""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the schedule, as a fraction of its peak"""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and evaluate and save that; e.g. 0.999"""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a loss or gradients of NaN: stop before saving them, or skip the step"""

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the whole run."""
        return self.steps or (self.epochs or 1) * steps_per_epoch

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "epochs", "steps")
        self._require(0, "warmup_steps")
        if self.epochs is not None and self.steps is not None:
            raise UnsupportedInput(
                f"both --epochs {self.epochs} and --steps {self.steps} are given, which may contradict each other. "
                f"Give one of them."
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise UnsupportedInput(
                f"--min-lr-ratio is {self.min_lr_ratio}, but a fraction of the peak learning rate must be in [0, 1]. "
                f"Give such a number, e.g. 0.1."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UnsupportedInput(
                f"--ema-decay is {self.ema_decay}, but it must be in (0, 1), or the average would be one of nothing. "
                f"Give such a number, e.g. 0.999."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """How the model is evaluated on data that it is not trained on."""

    TITLE = "evaluation"

    eval_dataset: str | None = None
    """Evaluation set, as for --dataset (default: the dataset's held-out split)"""
    eval_every: int | None = None
    """Steps between evaluations (default: at the end of each epoch and of the run)"""
    eval_samples: int = 1000
    """Evaluate on at most this many samples of the evaluation set, evenly spread; 0: on all"""
    early_stop: int | None = None
    """End the run after this many evaluations without improvement"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "eval_every", "early_stop")
        self._require(0, "eval_samples")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What is written down, and where."""

    TITLE = "run folder"

    log_every: int = 10
    """Steps between logged steps; a logged step is slower, because its memory is measured"""
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved"""
    keep_last: int | None = None
    """Checkpoints to keep: the newest ones (default: all)"""
    keep_every: int | None = None
    """Also keep those of every N-th step"""
    root_path: str = "runs"
    """The run's folder is ROOT_PATH/DATASET/MARK"""
    mark: str | None = None
    """Name of this run (default: the model's name)"""
    resume: str | None = None
    """auto (or no value): continue this run if it exists; PATH: continue from that checkpoint"""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard into the run folder"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "log_every", "save_every", "keep_last", "keep_every")
