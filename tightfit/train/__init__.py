"""The trainer: built-in models and data, the training loop, the run folder."""

from tightfit.train.config import TrainConfig, WorkConfig
from tightfit.train.failures import TrainingFailed
from tightfit.train.signals import Interrupted
from tightfit.train.workload import Workload, build, resolve

__all__ = [
    "Interrupted",
    "TrainConfig",
    "TrainingFailed",
    "WorkConfig",
    "Workload",
    "build",
    "resolve",
]
