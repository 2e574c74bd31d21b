"""A recipe of the plan with its operation names resolved to this PyTorch's operators."""

from __future__ import annotations

from typing import Any

from tightfit._torch_private import find_overload
from tightfit.records import Group, Recipe


class LiveRecipe:
    """What a tape needs to follow a plan, in the form that is fastest to ask."""

    __slots__ = (
        "drop",
        "funcs",
        "group",
        "keep",
        "length",
        "passes",
        "place",
        "record",
        "replay_count",
        "rerun",
    )  # fmt: skip

    def __init__(self, recipe: Recipe, group: Group | None = None, place: int = 0) -> None:
        self.group = group
        """The regions with which this one shares a tape; None: it has its own."""
        self.place = place
        """Its place among them."""
        # An operator that this PyTorch lacks is None: the live tape then leaves the plan at that operation, safely.
        self.funcs: tuple[Any, ...] = tuple(find_overload(name) for name in recipe.op_names)
        self.length = len(self.funcs)
        needed = frozenset(recipe.replay)
        self.record = tuple(position in needed for position in range(self.length))
        self.replay_count = len(needed)
        """Operations that replay needs."""
        # What replay does not need just runs, as long as the plan is followed. The end of the plan passes nothing.
        self.passes = (*(None if position in needed else func for position, func in enumerate(self.funcs)), None)
        """At each position, the operation that runs there if it need not be written down."""
        self.rerun = recipe.rerun
        """No tape: the module's forward is run again as a whole."""
        self.keep = frozenset(recipe.keep)
        self.drop = frozenset(recipe.drop)
