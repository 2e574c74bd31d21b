"""`tightfit.__all__` is the public face: complete, importable, documented."""

from __future__ import annotations

import inspect
import types

import tightfit

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
    "TightfitError",
    "BudgetInfeasible",
    "PlanMismatch",
    "VerificationFailed",
    "UnsupportedInput",
}


def test_the_contract_is_kept() -> None:
    assert set(tightfit.__all__) >= CONTRACT


def test_all_is_complete() -> None:
    assert len(tightfit.__all__) == len(set(tightfit.__all__))
    public = {
        name
        for name, value in vars(tightfit).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public <= set(tightfit.__all__)


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in tightfit.__all__:
        value = getattr(tightfit, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"tightfit.{name} has no docstring"
