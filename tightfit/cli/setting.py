"""Settings: the fields of frozen dataclasses, with their types, defaults and the docstrings under them as help.

Values are converted from what people write on the command line or in YAML.
"""

from __future__ import annotations

import ast
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any

from tightfit.errors import UnsupportedInput
from tightfit.train.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of an options dataclass, as a flag."""

    name: str
    type: Any
    """Without ``None``."""
    help: str
    group: str
    """Heading under which ``--help`` shows it."""
    words: Mapping[str, Any] = field(default_factory=dict)
    """Words that may stand for a value."""

    @property
    def flag(self) -> str:
        """``--batch-size`` for ``batch_size``."""
        return "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a closed choice; empty if it is open."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is typing.Literal else ()

    @property
    def is_mapping(self) -> bool:
        """Whether it takes ``key=value`` pairs."""
        return typing.get_origin(self.type) is Mapping or typing.get_origin(self.type) is MAPPING_ORIGIN

    @property
    def is_repeatable(self) -> bool:
        """Whether its flag may be given several times, each for one more value."""
        return typing.get_origin(self.type) is tuple

    @property
    def metavar(self) -> str:
        """How the value is shown in help."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        if self.is_mapping:
            return "KEY=VALUE"
        if self.is_repeatable:
            return "PATTERN"
        if self.words:
            return "{N," + ",".join(self.words) + "}"
        return {int: "N", float: "X"}.get(self.type, self.name.split("_")[-1].upper())

    def convert(self, value: Any, where: str) -> Any:
        """Convert a string, or what YAML made of it, to this setting's type; an error names ``where``."""
        if value is None:
            return None
        if isinstance(value, str) and value in self.words:
            return self.words[value]
        if self.is_mapping:
            if not isinstance(value, Mapping):
                raise UnsupportedInput(f"{where} is {value!r}, but it takes key: value pairs. Write them as a mapping.")
            return dict(value)
        if self.is_repeatable:
            return tuple(str(one) for one in (value if isinstance(value, list | tuple) else [value]))
        if self.choices:
            # YAML reads a bare `off` as False.
            text = "off" if value is False and "off" in self.choices else str(value)
            if text not in self.choices:
                raise UnsupportedInput(
                    f"{where} is {text!r}, which is not a choice.{did_you_mean(text, self.choices)} "
                    f"Choose one of: {', '.join(self.choices)}."
                )
            return text
        if self.type is bool:
            if isinstance(value, bool) or str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
            raise UnsupportedInput(f"{where} is {value!r}, but it is either true or false. Write one of them.")
        try:
            if self.type is int and isinstance(value, float | bool):
                raise ValueError
            return self.type(value)
        except (TypeError, ValueError):
            raise UnsupportedInput(
                f"{where} is {value!r}, which is not a {'whole number' if self.type is int else 'number'}. "
                f"Write it like {where} {'100' if self.type is int else '0.001'}."
            ) from None


MAPPING_ORIGIN = typing.get_origin(Mapping[str, object])


def settings_of(options: type[Any]) -> tuple[Setting, ...]:
    """Return the fields of an options dataclass as settings, in order."""
    return _derive_settings(options)  # type: ignore[arg-type]  # mypy does not take a class for hashable


@cache
def _derive_settings(options: type[Any]) -> tuple[Setting, ...]:
    hints = typing.get_type_hints(options)
    docs = field_docs(options)
    return tuple(
        Setting(
            name=entry.name,
            type=_without_none(hints[entry.name]),
            help=docs.get(entry.name, "") + _default_note(entry.default),
            group=_group_of(entry.name, options),
            words=entry.metadata.get("words", {}),
        )
        for entry in fields(options)
        if typing.get_origin(hints[entry.name]) is not typing.ClassVar and entry.metadata.get("flag", True)
    )


def _group_of(name: str, options: type[Any]) -> str:
    """Return the title of the class that declares a field first; a command's own fields are about its output."""
    for kind in reversed(options.__mro__):
        if name in vars(kind).get("__annotations__", {}):
            return str(getattr(kind, "TITLE", "") or "output")
    return "output"


def field_docs(options: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and its bases; empty if there is no source."""
    docs: dict[str, str] = {}
    for kind in reversed(options.__mro__[:-1]):
        docs.update(_docs_in(kind.__module__).get(kind.__qualname__, {}))
    return docs


@cache
def _docs_in(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings under the fields of each class of a module, from one reading of its source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):
        return {}
    return {node.name: _docs_of(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_of(node: ast.ClassDef) -> dict[str, str]:
    docs: dict[str, str] = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (only,) = (part for part in typing.get_args(hint) if part is not type(None))
        return only
    return hint


def _default_note(default: object) -> str:
    return "" if default is MISSING or default in (None, False, ()) else f" (default: {default})"
