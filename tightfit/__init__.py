"""tightfit trains any PyTorch model inside the memory you have.

    applied = tightfit.fit(model, batch, budget="8GiB", loss=loss_fn, optimizer=optimizer)

measures a step, solves for what to keep and what to recompute in backward, installs the plan without touching the
model's code, and proves that the gradients are bit for bit the same.

Profiles and plans can be read, solved and simulated where PyTorch is not installed; everything else needs it.
"""

import importlib.util as _util

from tightfit.errors import BudgetInfeasible, PlanMismatch, TightfitError, UnsupportedInput, VerificationFailed
from tightfit.records import Plan, Profile, Verdict
from tightfit.solver.frontier import frontier
from tightfit.solver.solver import solve

try:
    _has_torch = _util.find_spec("torch") is not None
except ValueError:  # sys.modules["torch"] is None: its import is blocked
    _has_torch = False

if _has_torch:
    from tightfit.device.budget import Budget
    from tightfit.installation.applied import Applied
    from tightfit.installation.install import apply
    from tightfit.operators.pure_modules import allow_recompute
    from tightfit.planning.fit import fit
    from tightfit.profiling.measure import measure
    from tightfit.step.step import Step
    from tightfit.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Applied",
    "Budget",
    "BudgetInfeasible",
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
    "fit",
    "frontier",
    "measure",
    "solve",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        raise ImportError(f"tightfit.{name} needs PyTorch, which is not installed here. Install torch 2.11 or newer.")
    raise AttributeError(f"module 'tightfit' has no attribute {name!r}")
