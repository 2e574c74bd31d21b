"""Resolve a recipe of a plan: its operations to this PyTorch's operators, its executor's name to the executor."""

from __future__ import annotations

from typing import Any

from tightfit.device import device_for
from tightfit.operators.facts import operation_named
from tightfit.records import Recipe, SharedTape
from tightfit.replay.executors import RegionCall, executor_of
from tightfit.replay.executors.module import has_convolutions
from tightfit.replay.executors.module_state import Moves


class ResolvedRecipe:
    """A recipe in the form that is fastest to ask: operators, positions, sets."""

    __slots__ = (
        "_calls_convolutions_again",
        "drop",
        "executor",
        "funcs",
        "keep",
        "length",
        "passes",
        "place",
        "recipe",
        "record",
        "shared",
    )  # fmt: skip

    def __init__(self, recipe: Recipe, shared: SharedTape | None = None, place: int = 0) -> None:
        """Resolve a recipe.

        Raises:
            PlanMismatch: there is no executor for it.
        """
        self.recipe = recipe
        self.executor = executor_of(recipe)
        self.shared = shared
        """The regions with which this one shares a tape; None: it has its own."""
        self.place = place
        """Its place among them."""
        # An operator that this PyTorch lacks is None: the live tape then leaves the plan at that operation, safely.
        self.funcs: tuple[Any, ...] = tuple(operation_named(name) for name in recipe.op_names)
        self.length = len(self.funcs)
        needed = frozenset(recipe.replay)
        self.record = tuple(position in needed for position in range(self.length))
        # What replay does not need just runs, as long as the plan is followed. The end of the plan passes nothing.
        self.passes = (*(None if position in needed else func for position, func in enumerate(self.funcs)), None)
        """At each position, the operation that runs there if it need not be written down."""
        self.keep = frozenset(recipe.keep)
        self.drop = frozenset(recipe.drop)
        self._calls_convolutions_again = not self.executor.on_tape and has_convolutions(recipe)

    def accepts(self, call: RegionCall | None) -> bool:
        """Return whether its executor can carry out this call; where it cannot, a tape drops as much."""
        if call is not None and self._calls_convolutions_again:
            return not device_for(call.module).convolutions_differ_by_thread() and self.executor.accepts(call)
        return self.executor.accepts(call)

    def carry_out(self, call: RegionCall) -> Any:
        """Make a call of the region's module as the recipe says."""
        return self.executor.run(call, self.recipe)

    def find_moves(self, call: RegionCall) -> Moves | None:
        """Return what making a call again has to put back; None if it must not be made again."""
        return self.executor.find_moves(call, self.recipe)
