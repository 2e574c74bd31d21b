"""recollect trains any PyTorch model inside the memory you have.

    applied = recollect.fit(model, batch, budget="8GiB", loss=loss_fn, optimizer=optimizer)

measures a step, solves for what to keep and what to recompute in backward, installs the plan without touching the
model's code, and proves that the gradients are bit for bit the same.
"""

from recollect.apply import Applied, apply
from recollect.errors import BudgetInfeasible, PlanMismatch, RecollectError, UnsupportedInput, VerificationFailed
from recollect.measure import measure
from recollect.planner import fit
from recollect.records import Plan, Profile, Verdict
from recollect.solve import solve
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
    "apply",
    "fit",
    "measure",
    "solve",
    "verify",
]
