"""`recollect.__all__` is the public face: complete, importable, documented."""

from __future__ import annotations

import inspect
import types

import recollect

#: The contract: what outside code may rely on.
CONTRACT = {
    "fit",
    "measure",
    "solve",
    "apply",
    "verify",
    "frontier",
    "Applied",
    "Profile",
    "Plan",
    "Verdict",
    "RecollectError",
    "BudgetInfeasible",
    "PlanMismatch",
    "VerificationFailed",
    "UnsupportedInput",
}


def test_the_contract_is_kept() -> None:
    assert set(recollect.__all__) >= CONTRACT


def test_all_is_complete() -> None:
    assert len(recollect.__all__) == len(set(recollect.__all__))
    public = {
        name
        for name, value in vars(recollect).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public <= set(recollect.__all__)


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in recollect.__all__:
        value = getattr(recollect, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"recollect.{name} has no docstring"
