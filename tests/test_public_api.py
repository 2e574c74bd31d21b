"""`tightfit.__all__` is the public face: complete, importable, and explained by `help`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import pytest

import tightfit

#: The contract: what outside code may rely on.
CONTRACT = {
    "fit",
    "measure",
    "solve",
    "apply",
    "verify",
    "frontier",
    "allow_recompute",
    "Applied",
    "Profile",
    "Plan",
    "Step",
    "Verdict",
    "TightfitError",
    "BudgetInfeasible",
    "PlanMismatch",
    "VerificationFailed",
    "UnsupportedInput",
}
FUNCTIONS = sorted(name for name in tightfit.__all__ if inspect.isfunction(getattr(tightfit, name)))
CLASSES = sorted(name for name in tightfit.__all__ if inspect.isclass(getattr(tightfit, name)))
#: A docstring that sends the reader elsewhere instead of saying something.
POINTER = re.compile(r"(See|As for|As in|Like) [`\w.]+\.?( module)?\.?", re.IGNORECASE)


def test_the_contract_is_kept() -> None:
    assert set(tightfit.__all__) >= CONTRACT


def test_all_is_complete() -> None:
    assert len(tightfit.__all__) == len(set(tightfit.__all__))
    assert sorted(tightfit.__all__) == sorted([*FUNCTIONS, *CLASSES])
    public = {
        name
        for name, value in vars(tightfit).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public == set(tightfit.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_explains_its_arguments_and_shows_its_use(name: str) -> None:
    function = getattr(tightfit, name)
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert is_explained(argument, text), f"tightfit.{name} does not explain {argument}"
    assert inspect.signature(function).return_annotation == "None" or "\nReturns:\n" in text
    assert "\nRaises:\n" in text
    assert re.search(rf"^    .*tightfit\.{name}\(", text, re.MULTILINE), f"tightfit.{name} has no example"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_shows_its_use(name: str) -> None:
    text = inspect.getdoc(getattr(tightfit, name)) or ""
    assert re.search(r"^    .*tightfit\.\w+", text, re.MULTILINE), f"tightfit.{name} has no example"


@pytest.mark.parametrize("name", CLASSES)
def test_every_attribute_of_a_class_is_explained(name: str) -> None:
    kind = getattr(tightfit, name)
    unexplained = [attribute for attribute, text in attributes_of(kind) if not says_something(text)]
    assert unexplained == []


@pytest.mark.parametrize("name", tightfit.__all__)
def test_no_docstring_is_a_pointer(name: str) -> None:
    assert says_something(inspect.getdoc(getattr(tightfit, name)))


def is_explained(name: str, text: str) -> bool:
    """Tell whether a list of arguments or attributes has an entry for that name, perhaps with others before it."""
    return re.search(rf"^ +(\w+, )*{name}(, \w+)*: \S", text, re.MULTILINE) is not None


def says_something(text: str | None) -> bool:
    return bool(text) and not POINTER.fullmatch(text.splitlines()[0].strip())


def attributes_of(kind: type) -> Iterator[tuple[str, str | None]]:
    """The public methods, properties, fields and instance attributes of our own classes, with what explains them."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] != "tightfit":
            continue
        own = inspect.getdoc(base) or ""
        for name, value in vars(base).items():
            if not name.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
                yield name, inspect.getdoc(getattr(base, name) if isinstance(value, classmethod) else value)
        for name, text in stated(base):
            yield name, "explained" if is_explained(name, own) else text


def stated(kind: type) -> Iterator[tuple[str, str | None]]:
    """The public fields and instance attributes that a class's source states, with the strings below them."""
    definition: Any = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    bodies = [definition.body]
    bodies += [part.body for part in definition.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    for body in bodies:
        for statement, following in zip(body, [*body[1:], None], strict=True):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            kinds = ast.Name if body is definition.body else ast.Attribute  # self.name in __init__
            for target in targets:
                name = getattr(target, "id", getattr(target, "attr", "_")) if isinstance(target, kinds) else "_"
                if not name.startswith("_"):
                    value = following.value if isinstance(following, ast.Expr) else None
                    yield name, value.value if isinstance(value, ast.Constant) else None


def test_help_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name in tightfit.__all__:
        help(getattr(tightfit, name))
        assert "See the module" not in capsys.readouterr().out
    assert sys.modules["tightfit"].__doc__
