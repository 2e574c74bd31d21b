"""The tape as an executor: forward runs as it is, and the session's tape follows the recipe, operation by operation."""

from __future__ import annotations

from typing import Any

from tightfit.records import Action, Recipe
from tightfit.replay.executors.executor import RegionCall
from tightfit.replay.executors.module_state import NO_MOVES, Moves


class TapeExecutor:
    """Replays single operations; the work is done by `tightfit.replay.session` and `tightfit.replay.tape`."""

    name = "tape"
    actions = frozenset({Action.KEEP, Action.RECOMPUTE})
    on_tape = True

    def accepts(self, call: RegionCall | None) -> bool:
        """Return True: the live tape decides at every operation what it can do."""
        return True

    def run(self, call: RegionCall, recipe: Recipe) -> Any:
        """Make the call; the tape watches."""
        return call.run_forward()

    def find_moves(self, call: RegionCall, recipe: Recipe) -> Moves | None:
        """Return that nothing moves: no call is made again."""
        return NO_MOVES
