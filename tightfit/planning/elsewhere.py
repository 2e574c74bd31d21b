"""Plan a step for a GPU that is not here."""

from __future__ import annotations

from typing import Any

import torch

from tightfit.device.described.cards import Card
from tightfit.device.described.fitting import Fitting
from tightfit.device.described.gpu import DescribedDevice
from tightfit.errors import BudgetInfeasible
from tightfit.planning.measure import naming_unproven
from tightfit.profiling.measure import measure_described
from tightfit.records import Plan
from tightfit.solver.solver import Solver, solver_of
from tightfit.step.step import Step


def fit_elsewhere(model: torch.nn.Module, batch: Any, step: Step, card: Card, budget_bytes: int) -> Fitting:
    """Measure a step for a card, and plan it for a budget.

    Raises:
        UnsupportedInput: the step cannot run without data.
    """
    profile = naming_unproven(measure_described(model, batch, step, DescribedDevice(card)))
    solver = solver_of(profile)
    smallest_bytes, where = solver.minimum_budget()
    return Fitting(
        card=card,
        profile=profile,
        budget_bytes=budget_bytes,
        plan=_planned(solver, budget_bytes),
        smallest_bytes=smallest_bytes,
        smallest_where=where,
    )


def _planned(solver: Solver, budget_bytes: int) -> Plan:
    try:
        return solver.solve(budget_bytes)
    except BudgetInfeasible:
        return solver.smallest_plan()
