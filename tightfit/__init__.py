"""tightfit trains any PyTorch model inside the memory you have.

    applied = tightfit.fit(model, batch, budget="8GiB", loss=loss_fn, optimizer=optimizer)

measures a step, solves for what to keep and what to recompute in backward, installs the plan without touching the
model's code, and proves that the gradients are bit for bit the same.

Profiles and plans can be read, solved and simulated where PyTorch is not installed; everything else needs it.
"""

import typing as _typing
from importlib import import_module as _import_module

from tightfit.errors import BudgetInfeasible, PlanMismatch, TightfitError, UnsupportedInput, VerificationFailed
from tightfit.records import Plan, Profile, Verdict

if _typing.TYPE_CHECKING:
    from tightfit.device.budget import Budget
    from tightfit.explanation.explain import explain
    from tightfit.explanation.explanation import Explanation
    from tightfit.installation.applied import Applied
    from tightfit.installation.install import apply
    from tightfit.operators.pure_modules import allow_recompute
    from tightfit.planning.fit import fit
    from tightfit.planning.grow import Growth, grow
    from tightfit.planning.measure import measure
    from tightfit.solver.frontier import frontier
    from tightfit.solver.solver import solve
    from tightfit.step.step import Step
    from tightfit.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Applied",
    "Budget",
    "BudgetInfeasible",
    "Explanation",
    "Growth",
    "Plan",
    "PlanMismatch",
    "Profile",
    "Step",
    "TightfitError",
    "UnsupportedInput",
    "Verdict",
    "VerificationFailed",
    "allow_recompute",
    "apply",
    "explain",
    "fit",
    "frontier",
    "grow",
    "measure",
    "solve",
    "verify",
]


#: What is imported when it is first used: importing all of it takes as long as a fifth of importing PyTorch.
_HOMES = {
    "Applied": "installation.applied",
    "Budget": "device.budget",
    "Explanation": "explanation.explanation",
    "Growth": "planning.grow",
    "Step": "step.step",
    "allow_recompute": "operators.pure_modules",
    "apply": "installation.install",
    "explain": "explanation.explain",
    "fit": "planning.fit",
    "frontier": "solver.frontier",
    "grow": "planning.grow",
    "measure": "planning.measure",
    "solve": "solver.solver",
    "verify": "verification.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tightfit' has no attribute {name!r}")
    try:
        found: object = getattr(_import_module(f"tightfit.{_HOMES[name]}"), name)
    except ModuleNotFoundError as problem:
        if problem.name != "torch":
            raise
        raise ImportError(
            f"tightfit.{name} needs PyTorch, which is not installed here. Install torch 2.11 or newer."
        ) from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
