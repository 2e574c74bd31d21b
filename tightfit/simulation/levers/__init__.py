"""The levers: each says what memory it holds when, what it costs, what it offers the solver, and what executes it.

A new lever is a file here and an entry in `LEVERS`.
"""

from __future__ import annotations

from tightfit.errors import PlanMismatch
from tightfit.simulation.levers.lever import (
    NOTHING,
    Happening,
    Lever,
    Moment,
    RegionModel,
    Request,
    Requests,
    ValueCosts,
    ValueLever,
)
from tightfit.simulation.levers.module import ModuleLever
from tightfit.simulation.levers.tape import TapeLever
from tightfit.simulation.levers.untouched import UntouchedModel

#: The lever that chooses value by value: the solver searches its decisions, and regions can share its tapes.
BY_VALUE: ValueLever = TapeLever()

LEVERS: tuple[Lever, ...] = (BY_VALUE, ModuleLever())


def lever_named(name: str) -> Lever:
    """Return the lever of that name.

    Raises:
        PlanMismatch: there is none.
    """
    for lever in LEVERS:
        if lever.name == name:
            return lever
    known = ", ".join(lever.name for lever in LEVERS)
    raise PlanMismatch(
        f"the plan was decided by a lever {name!r}, which this version of tightfit does not have (it has {known}). "
        "What such a plan costs cannot be predicted here. Solve again."
    )


__all__ = [
    "BY_VALUE",
    "LEVERS",
    "NOTHING",
    "Happening",
    "Lever",
    "Moment",
    "RegionModel",
    "Request",
    "Requests",
    "UntouchedModel",
    "ValueCosts",
    "ValueLever",
    "lever_named",
]
