"""Decide what happens to each saved value of a region: an action per value, and the lever that does it."""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple

#: A value's name inside its region: (operation's position, output's index).
ValueName = tuple[int, int]

#: How much a plan drops: as little as the budget needs, all that can be recomputed, or nothing.
GradCheckpoint = Literal["auto", "full", "off"]


class Action(Enum):
    """What happens to a saved value between forward and backward."""

    KEEP = "keep"
    """It is held."""
    RECOMPUTE = "recompute"
    """It is dropped, and made again when backward asks for it."""
    OFFLOAD = "offload"
    """It is moved to host memory, and brought back when backward asks for it."""


class Decision(NamedTuple):
    """An action for each droppable saved value of a region.  ``None`` in its place leaves the region untouched.

    A named tuple, as the solver looks columns up by it, thousands of times for one plan.
    """

    lever: str
    """Name of the lever that carries it out, see `tightfit.simulation.levers`."""
    kept: frozenset[ValueName] = frozenset()
    """Values that are held: saved ones, and others that recomputation reads."""
    offloaded: frozenset[ValueName] = frozenset()
    """Values that are moved to host memory."""

    def action(self, value: ValueName) -> Action:
        """Return what happens to a value: what is neither kept nor offloaded is recomputed."""
        if value in self.kept:
            return Action.KEEP
        return Action.OFFLOAD if value in self.offloaded else Action.RECOMPUTE
