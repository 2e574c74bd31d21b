"""recollect trains any PyTorch model inside the memory you have.

    applied = recollect.fit(model, batch, budget="8GiB", loss=loss_fn, optimizer=optimizer)

measures a step, solves for what to keep and what to recompute in backward, installs the plan without touching the
model's code, and proves that the gradients are bit for bit the same.

Profiles and plans can be read, solved and simulated where PyTorch is not installed; everything else needs it.
"""

import importlib.util as _util

from recollect.errors import BudgetInfeasible, PlanMismatch, RecollectError, UnsupportedInput, VerificationFailed
from recollect.records import Plan, Profile, Verdict
from recollect.solve import frontier, solve

try:
    _has_torch = _util.find_spec("torch") is not None
except ValueError:  # sys.modules["torch"] is None: its import is blocked
    _has_torch = False

if _has_torch:
    from recollect.apply import Applied, apply
    from recollect.measure import measure
    from recollect.planner import fit
    from recollect.replay.rerun import allow_rerun
    from recollect.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Applied",
    "BudgetInfeasible",
    "Plan",
    "PlanMismatch",
    "Profile",
    "RecollectError",
    "UnsupportedInput",
    "Verdict",
    "VerificationFailed",
    "allow_rerun",
    "apply",
    "fit",
    "frontier",
    "measure",
    "solve",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        raise ImportError(f"recollect.{name} needs PyTorch, which is not installed here. Install torch 2.11 or newer.")
    raise AttributeError(f"module 'recollect' has no attribute {name!r}")
