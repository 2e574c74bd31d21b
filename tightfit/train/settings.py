"""The settings of a run, group by group.  The command line, YAML files and ``config.yaml`` are derived from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tightfit.errors import UnsupportedInput
from tightfit.train.models import TransformersTask
from tightfit.train.optimizers import OptimizerName
from tightfit.train.precision import Precision
from tightfit.train.schedules import ScheduleName

GradCheckpoint = Literal["auto", "full", "off"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all groups share."""

    TITLE: ClassVar[str] = ""
    """Heading of the group in ``--help``."""

    def __post_init__(self) -> None:
        """Groups check their values here, and call this of the next one."""

    def _require(self, least: float, *names: str) -> None:
        """Each named setting is None or at least `least`; 1 stands for whole numbers above zero."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                wanted = "at least 1" if least == 1 else "zero or more"
                raise UnsupportedInput(
                    f"{name.replace('_', ' ')} is {value}, but {wanted} is needed. "
                    f"Give --{name.replace('_', '-')} a number that is {wanted}."
                )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which model."""

    TITLE = "model"

    model: str = "gpt"
    """A name of `tightfit models`, transformers:CONFIG.json (or folder), or package.module:factory"""
    model_args: Mapping[str, object] = field(default_factory=dict)
    """Settings of the model, as key=value"""
    task: TransformersTask | None = None
    """What a transformers: model is trained for, where its config does not say"""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Which data, and how a step is made of it."""

    TITLE = "data"

    dataset: str | None = None
    """A name of `tightfit datasets`, a path (text, CSV, JSONL, a folder of text or of images by class), or
    package.module:factory (default: the model's usual)"""
    dataset_args: Mapping[str, object] = field(default_factory=dict)
    """Arguments of a dataset's factory, as key=value"""
    sequence_length: int | None = None
    """Tokens or time steps in a sample (default: the model's usual)"""
    tokenizer: str | None = None
    """A tokenizer.json or a folder that holds one (default: the model folder's own, else bytes)"""
    packing: Literal["on", "off"] = "on"
    """Text for language models: join documents into sequences of equal length; off: a document (a file, a row of a
    table) is a sample of its own, and the shorter ones of a batch are padded"""
    text_column: str | None = None
    """Of a table: the text, or what is to be turned into the target (default: found by its name)"""
    label_column: str | None = None
    """Of a table: the class (default: found by its name)"""
    target_column: str | None = None
    """Of a table: what the text is to become (default: found by its name)"""
    image_size: int | None = None
    """Pixels on a side of the images of a folder (default: 224)"""
    workers: int = 0
    """Processes that load data ahead; 0: the training process itself"""
    batch_size: int = 16
    """Samples for each optimizer step"""
    microbatch_size: int | None = None
    """Samples run at a time, where the batch is to be split (default: all at once)"""
    accumulation_steps: int | None = None
    """The same, as the number of parts"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "batch_size", "sequence_length", "image_size", "microbatch_size", "accumulation_steps")
        self._require(0, "workers")
        if self.microbatch_size is not None and self.accumulation_steps is not None:
            raise UnsupportedInput(
                f"both a microbatch size ({self.microbatch_size}) and accumulation steps ({self.accumulation_steps}) "
                f"are given, which may contradict each other. Give one of --microbatch-size and --accumulation-steps."
            )
        for name, value in (("microbatch-size", self.microbatch_size), ("accumulation-steps", self.accumulation_steps)):
            if value is not None and value > self.batch_size:
                raise UnsupportedInput(
                    f"--{name} is {value}, but the batch has only {self.batch_size} samples to split. "
                    f"Give a number up to {self.batch_size}, or a larger --batch-size."
                )

    def samples_at_a_time(self, world_size: int = 1) -> int:
        """Samples of the largest microbatch of one of several processes."""
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
    """Learning rate, at its highest"""
    weight_decay: float = 0.01
    """Of matrices; biases, norms and other vectors are never decayed"""
    momentum: float = 0.9
    """Of sgd"""
    beta2: float = 0.999
    """Of adamw and adam: how slowly the mean square of gradients moves"""
    clip_norm: float | None = None
    """Scale gradients down to this total norm where it is larger"""
    precision: Precision = "fp32"
    """fp32; bf16: forward under autocast; fp16: the same with a loss scaler, on CUDA"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lr < float("inf"):
            raise UnsupportedInput(
                f"the learning rate is {self.lr}, so the weights would not move towards a smaller loss. "
                f"Give a number above zero: --lr 1e-3."
            )
        self._require(0, "weight_decay")
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UnsupportedInput(
                    f"{name} is {getattr(self, name)}, but it is a mean's share of the past: from 0 to below 1. "
                    f"Give --{name} such a number."
                )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UnsupportedInput(
                f"the clip norm is {self.clip_norm}, so every gradient would become zero. "
                f"Give --clip-norm a number above zero, e.g. 1.0, or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """Inside which memory."""

    TITLE = "memory"

    memory: str = "auto"
    """The budget: 8GiB, 8GB, 75% of the device's memory, or auto: what the device has free"""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Where, and how repeatable."""

    TITLE = "device"

    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: CUDA where there is one"""
    seed: int = 0
    """Decides the first weights, the order of the data and dropout"""
    deterministic: bool = False
    """Have PyTorch use only operations that give the same bits every time, or say which one cannot"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise UnsupportedInput(
                f"the seed is {self.seed}, but the generators take 0 to 2**63 - 1. Give a --seed in that range."
            )


@dataclass(frozen=True, kw_only=True)
class LengthSettings(Settings):
    """How long, and how the learning rate moves."""

    TITLE = "training"

    epochs: int | None = None
    """Passes over the data (default: 1, unless --steps is given)"""
    steps: int | None = None
    """Optimizer steps in all, resumed ones included"""
    schedule: ScheduleName = "constant"
    """How the learning rate moves after the warm-up, down to MIN_LR_RATIO at the last step"""
    warmup_steps: int = 0
    """Steps in which the learning rate rises to its highest"""
    min_lr_ratio: float = 0.0
    """Where the schedule ends, in parts of the highest learning rate"""
    ema_decay: float | None = None
    """Keep a moving average of the weights, which is what is evaluated and saved; e.g. 0.999"""

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or (self.epochs or 1) * steps_per_epoch

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "epochs", "steps")
        self._require(0, "warmup_steps")
        if self.epochs is not None and self.steps is not None:
            raise UnsupportedInput(
                f"both epochs ({self.epochs}) and steps ({self.steps}) are given, which may contradict each other. "
                f"Give one of --epochs and --steps."
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise UnsupportedInput(
                f"the learning rate is to end at {self.min_lr_ratio} of its highest, but a part is from 0 to 1. "
                f"Give --min-lr-ratio such a number, e.g. 0.1."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UnsupportedInput(
                f"the moving average's decay is {self.ema_decay}, but it is the past's share: above 0 and below 1. "
                f"Give --ema-decay such a number, e.g. 0.999."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """How the model is judged on data that it is not trained on."""

    TITLE = "evaluation"

    eval_dataset: str | None = None
    """Data to evaluate on, as for --dataset (default: what the dataset holds out)"""
    eval_every: int | None = None
    """Steps between two evaluations (default: the end of each epoch, and of the run)"""
    eval_samples: int = 1000
    """Evaluate on so many samples at most, evenly spread over those that are held out; 0: on all"""
    early_stop: int | None = None
    """End the run after so many evaluations without a better one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "eval_every", "early_stop")
        self._require(0, "eval_samples")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What is written down, and where."""

    TITLE = "run folder"

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
    tensorboard: bool = False
    """Write what is logged for TensorBoard, too, into the run's folder"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "log_every", "save_every")
