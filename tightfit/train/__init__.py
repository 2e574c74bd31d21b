"""The trainer: built-in models and data, the loop, the run folder."""

from tightfit.train.config import TrainConfig, WorkConfig
from tightfit.train.optimizer_step import TrainingFailed
from tightfit.train.reporter import Reporter
from tightfit.train.signals import Interrupted
from tightfit.train.summary import RunSummary, format_summary
from tightfit.train.workload import Workload, build, resolve

__all__ = [
    "Interrupted",
    "Reporter",
    "RunSummary",
    "TrainConfig",
    "TrainingFailed",
    "WorkConfig",
    "Workload",
    "build",
    "format_summary",
    "resolve",
]
