"""The executors: how a region carries out its recipe, by name.

A new executor is a file here and an entry in `EXECUTORS`.
"""

from __future__ import annotations

from tightfit.errors import PlanMismatch
from tightfit.records import Action, Recipe
from tightfit.replay.executors.executor import Executor, RegionCall
from tightfit.replay.executors.module import ModuleExecutor
from tightfit.replay.executors.tape import TapeExecutor

EXECUTORS: tuple[Executor, ...] = (TapeExecutor(), ModuleExecutor())


def executor_of(recipe: Recipe) -> Executor:
    """Return the executor that a recipe names.

    Raises:
        PlanMismatch: there is none of that name, or it cannot do what the recipe asks.
    """
    for executor in EXECUTORS:
        if executor.name == recipe.executor:
            break
    else:
        known = ", ".join(executor.name for executor in EXECUTORS)
        raise PlanMismatch(
            f"the plan has regions for an executor {recipe.executor!r}, which this version of tightfit does not have "
            f"(it has {known}). Nothing here can carry out these regions. Solve again with this version."
        )
    wanted = {Action.KEEP: recipe.keep, Action.RECOMPUTE: recipe.drop, Action.OFFLOAD: recipe.offload}
    for action, values in wanted.items():
        if values and action not in executor.actions:
            raise PlanMismatch(
                f"the plan asks the executor {executor.name!r} to {action.value} saved values, which it cannot do. "
                "The plan is damaged, or of another version. Solve again with this version."
            )
    return executor


__all__ = ["EXECUTORS", "Executor", "RegionCall", "executor_of"]
