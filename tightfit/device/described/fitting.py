"""Would a step fit on a GPU that is not here: as it is, with recomputation, or on which other card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tightfit.device.described.cards import Card, cards
from tightfit.records import Plan, Profile

#: How a step runs within a memory: plainly, with a plan, or not at all.
Fit = Literal["plain", "planned", "no"]


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What is known of a step on a card."""

    card: Card
    profile: Profile
    budget_bytes: int
    plan: Plan
    """For the budget; where that is too small, the plan with the smallest peak."""
    smallest_bytes: int
    """The smallest budget for which there is a plan."""
    smallest_where: str
    """What sets it."""

    @property
    def fit(self) -> Fit:
        """How the step runs within the budget."""
        return self.within(self.budget_bytes)

    def within(self, total_bytes: int) -> Fit:
        """Tell how the step runs within so many bytes, a context included."""
        if self.plan.plain_peak_bytes <= total_bytes:
            return "plain"
        return "planned" if self.smallest_bytes <= total_bytes else "no"

    def cards(self) -> Mapping[str, Fit]:
        """Tell how the step, as it runs on this card, would run within the memory of each card of the list."""
        return {name: self.within(card.capacity_bytes) for name, card in cards().items()}
