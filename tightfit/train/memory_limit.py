"""What a run has learnt of its device's memory: a step that ran out of it leaves a note, which later starts go by."""

from __future__ import annotations

import json
from pathlib import Path

from tightfit.device.budget import Budget
from tightfit.errors import BudgetInfeasible
from tightfit.installation.applied import Applied
from tightfit.solver.solver import solve
from tightfit.train.files import write_text

FILE = "memory-limit.json"
_MOST_BYTES = 10_000
#: Of the peak of the plan under which a step ran out of memory, what the next one may hold.
_TIGHTER = 0.9


def limit_below(applied: Applied, budget: Budget) -> int | None:
    """Return how many bytes, in total, leave more room than the installed plan; None: no plan needs less."""
    assert applied.profile is not None
    peak_bytes = applied.plan.predicted_peak_bytes
    step_bytes = int(_TIGHTER * peak_bytes)
    try:
        solve(applied.profile, budget_bytes=step_bytes)
    except BudgetInfeasible as problem:
        step_bytes = problem.required_bytes
    return None if step_bytes >= peak_bytes else step_bytes + budget.beside_step_bytes


def note_limit(folder: Path, limit_bytes: int, why: str) -> None:
    """Note in a run's folder that its plans may hold so many bytes in total; a lower limit that is there stays.

    Any process of a run may call this; where it cannot write there, nothing is noted.
    """
    known = noted_limit(folder)
    if folder.is_dir() and (known is None or limit_bytes < known):
        try:
            write_text(folder / FILE, json.dumps({"limit_bytes": limit_bytes, "why": why}, indent=2) + "\n")
        except OSError:
            return


def noted_limit(folder: Path) -> int | None:
    """Return the limit that is noted in a run's folder; None: there is none, or it cannot be read."""
    try:
        path = folder / FILE
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        limit = json.loads(path.read_text(encoding="utf-8"))["limit_bytes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return limit if type(limit) is int and limit > 0 else None
