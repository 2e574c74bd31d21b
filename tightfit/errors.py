"""Exceptions that tightfit raises.

Every layer raises them, so this module imports only `peak_breakdown` and `units`.

    TightfitError
    |-- BudgetInfeasible      no plan fits the budget; carries the smallest one that would
    |-- PlanMismatch          a plan or profile belongs to another model, or its file is damaged
    |-- VerificationFailed    a planned step did not equal the plain step; carries the verdict
    |-- RanOutOfMemory        a trial step of a sharded model did, on this rank
    |-- DeviceLost            an operation that was measured has broken the device for this process
    `-- UnsupportedInput      a model, batch, loss or budget that tightfit cannot work with (also a ValueError)

Every message says what was found, why the work cannot go on, and what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.units import format_budget, format_bytes

_LONGEST_LINE = 300


def first_line(problem: BaseException) -> str:
    """Return the first line of an error's message, or its type's name where it has none; for a message of ours."""
    lines = str(problem).strip().splitlines()
    return lines[0][:_LONGEST_LINE] if lines else type(problem).__name__


#: What to do about a file that could not be written, by the system's error.
_REMEDIES = (
    ((errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)), "Make room there"),
    ((errno.EFBIG,), "Raise the limit on the size of a file (ulimit -f), or take a disk that holds larger ones"),
    (
        (errno.EIO, getattr(errno, "ESTALE", errno.EIO), errno.ENODEV, errno.ENXIO),
        "The disk fails, or the connection to it: see the system's log, and copy the folder to another disk if it does "
        "not recover",
    ),
    (
        (errno.EROFS,),
        "The disk takes no more writes, often because it failed: see the system's log, and mount it anew",
    ),
    ((errno.EACCES, errno.EPERM), "Give back the permission to write there"),
    ((errno.ENOENT, errno.ENOTDIR), "Put the folder back, if it was moved"),
    ((errno.EISDIR, errno.EEXIST), "Remove what is in its place"),
    ((errno.EPIPE,), "Have its output read to the end, or write it to a file"),
    ((errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n)"),
)
_REMEDY = "Have the folder written to again"


def remedy_for(problem: str) -> str:
    """Say what to do about a file that could not be written, as a sentence without its end.

    Takes the error's words, which pass between processes and libraries, rather than its number, which does not.
    """
    for numbers, remedy in _REMEDIES:
        if any(os.strerror(number) in problem for number in numbers):
            return remedy
    return _REMEDY


class TightfitError(Exception):
    """Base of every error that tightfit raises on purpose.

    try:
        applied = tightfit.fit(model, batch, budget=budget)
    except tightfit.TightfitError as problem:
        sys.exit(str(problem))
    """


class BudgetInfeasible(TightfitError):
    """No plan keeps the peak within the budget.

        try:
            applied = tightfit.fit(model, batch, budget="2GiB")
        except tightfit.BudgetInfeasible as problem:
            applied = tightfit.fit(model, batch, budget=problem.required_bytes)

    Attributes:
        required_bytes: the smallest budget that tightfit can run.
        budget_bytes: the budget that was asked for.
        where: the moment that sets the smallest budget, e.g. a region's key, ``<loss>`` or ``optimizer step``.
        breakdown: bytes by component at that moment, as in `Plan.breakdown`; empty if unknown.
        switched_off: who keeps tightfit from recomputing a part of the step, as in `Profile.switched_off`.
        unproven: what plans would run again although no step has shown that it bears that, as in `Profile.unproven`:
            where there is any, more than `required_bytes` may be needed.
    """

    def __init__(
        self,
        required_bytes: int,
        budget_bytes: int,
        where: str,
        breakdown: Mapping[str, int] | None = None,
        *,
        switched_off: Sequence[str] = (),
        unproven: Sequence[str] = (),
    ) -> None:
        self.breakdown = dict(breakdown or {})
        parts = format_parts(parts_of_peak(self.breakdown, where))
        self.required_bytes = required_bytes
        self.budget_bytes = budget_bytes
        self.where = where
        self.switched_off = tuple(switched_off)
        self.unproven = tuple(unproven)
        obstacle = (
            f" A part of the step is beyond tightfit's reach because of {', '.join(self.switched_off)}: what is saved "
            f"there can be neither seen nor dropped. Switch that off (tightfit drops at least as much), or give more."
        )
        doubt = (
            f" No step has shown yet that {', '.join(self.unproven)} can be run again with the same result; what cannot"
            " is kept, and then more is needed: fit(...) tries it, and names what it takes."
        )
        context_bytes = self.breakdown.get("context", 0)
        beside = (
            f" (SIZE+context asks for a size beside the {format_bytes(context_bytes)} that are no tensors)"
            if context_bytes
            else ""
        )
        super().__init__(
            f"the budget of {format_bytes(budget_bytes)} is too small: even with everything recomputed that can be, "
            f"this step needs {format_budget(required_bytes)} ({required_bytes} bytes), set by {where}"
            f"{f': {parts}' if self.breakdown else ''}. "
            f"Give at least {required_bytes} bytes{beside}, or use a smaller batch or model."
            f"{obstacle if self.switched_off else ''}{doubt if self.unproven else ''}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(type(self), switched_off=self.switched_off, unproven=self.unproven)
        return make, (self.required_bytes, self.budget_bytes, self.where, self.breakdown)


class PlanMismatch(TightfitError):
    """A plan or profile does not belong to this model, or its file cannot be read as one.

    try:
        applied = tightfit.apply(model, tightfit.Plan.load("plan.json"))
    except tightfit.PlanMismatch:
        applied = tightfit.fit(model, batch, budget="8GiB")
    """


class VerificationFailed(TightfitError):
    """A planned step gave another loss, gradient, buffer or random state than the plain step, or exceeded the budget.

        try:
            applied = tightfit.fit(model, batch, budget="8GiB")
        except tightfit.VerificationFailed as problem:
            print(problem.found, problem.verdict)

    Attributes:
        found: what differs, or how far the peak is over, in words.
        verdict: the `Verdict`, which names all that differs; None where the planned step raised an error and the plain
            one did not, so that there was nothing to compare.
    """

    def __init__(self, found: str, verdict: Any = None) -> None:
        self.found = found
        self.verdict = verdict
        super().__init__(
            f"the planned step is not the plain step within its budget: {found}. Training under such a plan would be "
            "another training, so no plan is installed, and the model is as it was. If allow_recompute was given a "
            "class whose forward does more than compute (counts its calls, keeps a cache), take that back; if only the "
            "peak is too high, give a larger budget. Anything else is a fault of tightfit: please report it. "
            "on_failure='warn' goes on all the same."
        )

    def __reduce__(self) -> tuple[type[VerificationFailed], tuple[str, Any]]:
        return type(self), (self.found, self.verdict)


class ProofWarning(UserWarning):
    """A plan was installed though it was not proven equal to the plain step; the message says why not."""


class UnsupportedInput(TightfitError, ValueError):
    """A model, batch, loss, budget or setting that tightfit cannot work with; the message says what to change.

    try:
        applied = tightfit.fit(model, batch, budget="8 gigs")
    except tightfit.UnsupportedInput as problem:
        print(problem)
    """


class RanOutOfMemory(TightfitError):
    """A trial step of a sharded model ran out of memory on this rank, in the middle of what all ranks do together.

    Attributes:
        budget_bytes: the budget that was asked for.
        predicted_bytes: the peak that the plan was predicted to have.
        smaller_budget_bytes: a budget whose plan leaves more room.
    """

    def __init__(self, budget_bytes: int, predicted_bytes: int, smaller_budget_bytes: int, reason: str) -> None:
        self.budget_bytes = budget_bytes
        self.predicted_bytes = predicted_bytes
        self.smaller_budget_bytes = smaller_budget_bytes
        self.reason = reason
        super().__init__(
            f"a trial step of the sharded model ran out of memory ({reason}), though its predicted peak of "
            f"{format_bytes(predicted_bytes)} is within the budget of {format_bytes(budget_bytes)}. The other "
            f"processes are in the middle of that step, so no other plan can be tried. Start again with a budget of "
            f"{format_budget(smaller_budget_bytes)} ({smaller_budget_bytes} bytes), whose plan leaves room for more, "
            f"or free memory on the device."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.budget_bytes, self.predicted_bytes, self.smaller_budget_bytes, self.reason)


class DeviceLost(TightfitError):
    """An operation has broken the device for this process: every further call that uses it fails."""


class PromiseWarning(UserWarning):
    """Training went where an installed plan cannot keep its promise; the message says how, and what to do."""
