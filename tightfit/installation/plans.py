"""What an installed plan asks of the cache of plans that `fit` gives it: the plan for each batch, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tightfit.installation.resolved_plan import ResolvedPlan


@dataclass(slots=True)
class PlanStatistics:
    """Count what became of batches of other shapes than the one that `fit` was given."""

    tried: int = 0
    """Plans made as `fit` makes them, with a trial run."""
    solved: int = 0
    """Plans solved for a measured shape."""
    reused: int = 0
    """Shapes that were measured and got decisions made for another."""
    plain: int = 0
    """Shapes that were measured and need nothing dropped."""
    ample: int = 0
    """Shapes so small that they were not measured."""
    replanned: int = 0
    """Plans made again because steps did not follow them, or because backwards turned out to keep their graphs."""
    mismatched_steps: int = 0
    """Steps in which a region ran other operations than its plan's: safe, but not as planned."""
    unplanned_calls: int = 0
    """Forwards of a shape without a plan, made without `step(batch)`: all that is replayable was dropped."""
    forgotten: int = 0
    """Plans that went because there were too many."""
    planning_ms: float = 0.0
    """Time spent on all this."""

    def count(self, way: Literal["tried", "solved", "reused", "plain", "ample"]) -> None:
        """Count a plan that was made in one of these ways."""
        setattr(self, way, getattr(self, way) + 1)


class Plans(Protocol):
    """Know the plan for each batch."""

    @property
    def statistics(self) -> PlanStatistics:
        """What became of batches of other shapes."""

    def __len__(self) -> int:
        """How many plans are kept."""

    def plan_for(self, batch: Any, step: str = "") -> ResolvedPlan:
        """Return the plan for a batch in a kind of step, made now if there is none yet.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget. Nothing has changed.
        """

    def note_call(self, args: Any, kwargs: Any) -> None:
        """Note that the model is called with these arguments, for the batch that `plan_for` was last asked about."""

    def plan_for_call(self, args: Any, kwargs: Any, step: str = "") -> ResolvedPlan:
        """Return the plan for a forward call made without `step(batch)`, in a kind of step."""

    def note_mismatch(self) -> None:
        """Note that the forward that just ended did not follow the plan that was last asked for."""

    def note_kept_graph(self) -> int:
        """Note that the last step's backward kept its graph: plans for its kind are for such steps from now on.

        Returns:
            The peak in bytes of steps under the plans until now, if that is above the budget; else 0.
        """
