"""How a run went so far: kept in its checkpoints, so that a resumed run decides as an uninterrupted one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tightfit.train.evaluation import Evaluation
from tightfit.train.tasks import Task


@dataclass(kw_only=True)
class Progress:
    """The best evaluation so far, and the loss that the run began with."""

    loss_before: float
    """On the run's first batch, before its first step."""
    best: float | None = None
    """The best value so far of the metric that decides; None before the first evaluation."""
    best_step: int = 0
    """When it was reached."""
    evaluations_since_best: int = 0

    def note(self, evaluation: Evaluation, step: int, task: Task) -> bool:
        """Note an evaluation after step ``step``; returns whether it is the best so far."""
        value = evaluation.metrics[task.best]
        if not task.is_better(value, self.best):
            self.evaluations_since_best += 1
            return False
        self.best, self.best_step, self.evaluations_since_best = value, step, 0
        return True

    def has_stalled(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row were no better; None: never."""
        return patience is not None and self.evaluations_since_best >= patience

    def why_stopped(self, task: Task) -> str:
        """Say why early stopping has ended the run."""
        return (
            f"stopped early: {task.best.replace('_', ' ')} has not improved in {self.evaluations_since_best} "
            f"evaluations, since step {self.best_step}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Progress:
        """Read what `to_json` gave.

        Raises:
            TypeError, ValueError: it is something else.
        """
        read = cls(**state)
        numbers = [read.loss_before, *([] if read.best is None else [read.best])]
        if not all(type(number) in (int, float) for number in numbers):
            raise TypeError("a loss is no number")
        if not all(type(count) is int and count >= 0 for count in (read.best_step, read.evaluations_since_best)):
            raise ValueError("a count is none")
        return read
