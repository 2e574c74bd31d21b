"""The trainer: built-in models and data, the loop, the run folder."""

from recollect.train.config import TrainConfig, WorkConfig
from recollect.train.loop import run
from recollect.train.reporter import Reporter
from recollect.train.signals import Interrupted
from recollect.train.stepping import TrainingFailed
from recollect.train.summary import RunSummary, format_summary
from recollect.train.workload import Workload, build, resolve

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
    "run",
]
