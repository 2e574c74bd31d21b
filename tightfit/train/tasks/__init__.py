"""What a model is trained to do: its loss, what the loss is a mean over, and the metrics that evaluate it."""

from tightfit.train.tasks.choose import choose_task
from tightfit.train.tasks.task import Task

__all__ = ["Task", "choose_task"]
