"""What a run is made of: the one place where the settings of `train`, `plan`, `frontier` and `verify` come together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml

from tightfit.records.decision import GradCheckpoint
from tightfit.train.launch.settings import DistributedSettings
from tightfit.train.settings import (
    DataSettings,
    DeviceSettings,
    EvaluationSettings,
    LengthSettings,
    MemorySettings,
    ModelSettings,
    RunSettings,
    StepSettings,
)


@dataclass(frozen=True, kw_only=True)
class WorkConfig(DeviceSettings, MemorySettings, StepSettings, DataSettings, ModelSettings):
    """One training step: of which model, on which data, where, and inside which memory."""


@dataclass(frozen=True, kw_only=True)
class TrainMemorySettings(MemorySettings):
    """What training does about memory."""

    grad_checkpoint: GradCheckpoint = "auto"
    """auto: recompute as little as the budget allows; full: all that can be recomputed; off: nothing"""
    reference_memory: str | None = None
    """Memory that the proof may use to run the plain step for comparison (default: the budget)"""
    memory_cap: bool = False
    """Let PyTorch reserve no more than the budget (CUDA)"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunSettings, DistributedSettings, EvaluationSettings, LengthSettings, WorkConfig, TrainMemorySettings
):
    """A training run."""


#: Settings that say how a command is called, not what the run is: they do not enter ``config.yaml``.
PER_CALL = ("resume", "rank", "local_rank", "world_size", "dist_url")


def to_yaml(config: TrainConfig) -> str:
    """Write the settings as YAML that `tightfit train --config-file` reads."""
    settings: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name not in PER_CALL:
            value = list(value) if isinstance(value, tuple) else value
            settings[entry.name] = dict(value) if isinstance(value, Mapping) else value
    text: str = yaml.safe_dump(settings, sort_keys=False)
    return text
