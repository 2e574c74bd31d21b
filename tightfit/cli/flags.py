"""Command-line flags and YAML files, derived from frozen dataclasses.

Each field becomes a flag: its name (``batch_size`` is ``--batch-size``, and ``--batch_size`` works too), its type, its
default, and the docstring under it as help.  Values come from, each going before the one before it: the dataclass, the
YAML file of ``--config-file``, flags, and ``KEY VALUE`` pairs at the end of the line.

Built on argparse.  jsonargparse and tyro were tried on this contract: jsonargparse knows only the underscore spelling
of derived flags, no bare ``--grad-checkpoint`` and no hints for typing errors; tyro silently loses ``KEY VALUE`` pairs
that follow a flag with an optional value, and has no configuration file.  Bending either is longer than this module.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import yaml

from tightfit.errors import UnsupportedInput
from tightfit.train.registry import did_you_mean

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Options]):
    """A command whose settings are the fields of the dataclass `options`."""

    name: str
    summary: str
    options: type[Options]
    bare: Mapping[str, str] = field(default_factory=dict)
    """Fields whose flag may stand without a value, and what it means then."""
    alone: str | None = None
    """A field whose value may stand alone, without its flag."""

    def add_to(self, parsers: argparse._SubParsersAction[Parser], *, flags: bool) -> None:
        """Add the command's parser; its ``flags`` are needed only if it is the one that is run."""
        parser = parsers.add_parser(self.name, help=self.summary, description=self.summary, allow_abbrev=False)
        if flags:
            self._add_flags(parser)

    def _add_flags(self, parser: Parser) -> None:
        parser.add_argument("--config-file", metavar="FILE", help="YAML file with any of the settings below")
        words = "[KEY VALUE ...]" if self.alone is None else self.alone.upper()
        parser.usage = f"tightfit {self.name} [--config-file run.yaml] [flags] {words}"
        groups: dict[str, argparse._ArgumentGroup] = {}
        for setting in settings_of(self.options):
            group = groups.get(setting.group)
            if group is None:
                group = groups[setting.group] = parser.add_argument_group(setting.group)
            if setting.type is bool:
                group.add_argument(setting.flag, action="store_const", const=True, help=setting.help)
                continue
            group.add_argument(
                setting.flag,
                metavar=setting.metavar,
                nargs="+" if setting.is_mapping else "?" if setting.name in self.bare else None,
                const=self.bare.get(setting.name),
                help=setting.help.replace("%", "%%"),
            )

    def parse(self, found: argparse.Namespace, rest: Sequence[str]) -> Options:
        """Make the options from parsed flags and the words that were left over.

        Raises:
            UnsupportedInput: an unknown flag or key, or a value that does not fit.
        """
        settings = {setting.name: setting for setting in settings_of(self.options)}
        overrides = list(rest)
        values: dict[str, Any] = {}
        if self.alone is not None and len(overrides) == 1:
            values[self.alone] = overrides.pop()
        if found.config_file is not None:
            values.update(_read_config_file(Path(found.config_file), settings))
        for name, setting in settings.items():
            given = getattr(found, name)
            if given is None:
                continue
            if setting.is_mapping:
                pairs, misplaced = _split_pairs(given)
                overrides = misplaced + overrides
                values[name] = {**values.get(name, {}), **_parse_pairs(pairs, setting.flag)}
            else:
                values[name] = setting.convert(given, setting.flag)
        _apply_overrides(values, overrides, settings)
        return self.options(**values)


class Parser(argparse.ArgumentParser):
    """argparse's parser, raising errors instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as bad input."""
        raise UnsupportedInput(f"the command line cannot be understood: {message}. See `{self.prog} --help`.")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of an options dataclass, as a flag."""

    name: str
    type: Any
    """Without ``None``."""
    help: str
    group: str
    """Heading under which ``--help`` shows it."""

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
    def metavar(self) -> str:
        """How the value is shown in help."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        if self.is_mapping:
            return "KEY=VALUE"
        return {int: "N", float: "X"}.get(self.type, self.name.split("_")[-1].upper())

    def convert(self, value: Any, where: str) -> Any:
        """Convert a string, or what YAML made of it, to this setting's type; an error names ``where``."""
        if value is None:
            return None
        if self.is_mapping:
            if not isinstance(value, Mapping):
                raise UnsupportedInput(f"{where} is {value!r}, but it takes key: value pairs. Write them as a mapping.")
            return dict(value)
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
        )
        for entry in fields(options)
        if typing.get_origin(hints[entry.name]) is not typing.ClassVar
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


def normalise(arguments: Sequence[str], bare_flags: Mapping[str, str], keys: Sequence[str]) -> list[str]:
    """Turn underscores in flags into dashes, and insert a bare flag's value where the next word is a KEY.

    A bare ``--grad-checkpoint`` followed by the override ``STEPS 10`` would else take ``STEPS`` for its value.
    """
    normal: list[str] = []
    for position, word in enumerate(arguments):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            word = flag.replace("_", "-") + equals + value
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            if word in bare_flags and {_key(part) for part in following.split(".")} & set(keys):
                normal += [word, bare_flags[word]]
                continue
        normal.append(word)
    return normal


def refuse_unknown_flags(rest: Sequence[str], known: Sequence[str]) -> None:
    """Raise `UnsupportedInput` if a word in ``rest`` is a flag: argparse leaves unknown ones there."""
    for word in rest:
        if word.startswith("-") and word != "-" and not _is_number(word):
            flag = word.partition("=")[0]
            close = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UnsupportedInput(f"there is no flag {flag}.{hint} See all flags with --help.")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (only,) = (part for part in typing.get_args(hint) if part is not type(None))
        return only
    return hint


def _default_note(default: object) -> str:
    return "" if default is MISSING or default is None or default is False else f" (default: {default})"


def _key(word: str) -> str:
    return word.lower().replace("-", "_")


def _read_config_file(path: Path, settings: Mapping[str, Setting]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UnsupportedInput(
            f"the configuration file {path} cannot be read: {problem.strerror}. Check --config-file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        first_line = str(problem).splitlines()[0]
        raise UnsupportedInput(
            f"the configuration file {path} is not YAML: {first_line}. Write one `key: value` per line."
        ) from None
    if not isinstance(content, Mapping):
        raise UnsupportedInput(
            f"the configuration file {path} holds no settings. Write one `key: value` per line, e.g. `steps: 100`."
        )
    values = {}
    for key, value in _flat(content, settings):
        name, inner = _named(key, settings, f"the configuration file {path}")
        if inner:
            raise UnsupportedInput(
                f"{path}: {key} sets a part of {name}, which is done under it. Write {name}: and below it {inner}: ..."
            )
        values[name] = settings[name].convert(value, f"{path}: {key}")
    return values


def _flat(content: Mapping[Any, Any], settings: Mapping[str, Setting], section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys and values; those in a section, as in YACS files, with the section's name as prefix."""
    for key, value in content.items():
        setting = settings.get(_key(str(key)))
        if isinstance(value, Mapping) and (setting is None or not setting.is_mapping):
            yield from _flat(value, settings, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def _known_key(key: str, settings: Mapping[str, Setting], where: str) -> str:
    name = _key(key)
    if name not in settings:
        raise UnsupportedInput(
            f"{where} sets {key!r}, which is not a setting.{did_you_mean(name, settings)} "
            f"Settings are: {', '.join(settings)}."
        )
    return name


def _named(key: str, settings: Mapping[str, Setting], where: str) -> tuple[str, str]:
    """Find the setting that a key names, and the key inside it if it is a mapping.

    Sections are for people: ``MODEL.DIST_TRAIN`` is ``dist_train``, and ``MODEL.NAME`` is ``model``.
    """
    base, _, inner = key.partition(".")
    setting = settings.get(_key(base))
    if not inner or (setting is not None and setting.is_mapping):
        return _known_key(base, settings, where), inner
    last = inner.rpartition(".")[2]
    if _key(last) == "name" and setting is not None:
        return setting.name, ""
    return _known_key(last, settings, where), ""


def _split_pairs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``key=value`` words from the overrides after them, which argparse took for more of them."""
    for position, word in enumerate(words):
        if "=" not in word:
            return list(words[:position]), list(words[position:])
    return list(words), []


def _parse_pairs(pairs: Sequence[str], flag: str) -> dict[str, object]:
    parsed: dict[str, object] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if not key:
            raise UnsupportedInput(f"{flag} {pair} sets nothing: the key is missing. Write {flag} key=value.")
        parsed[key] = yaml.safe_load(text)
    return parsed


def _apply_overrides(values: dict[str, Any], words: Sequence[str], settings: Mapping[str, Setting]) -> None:
    if len(words) % 2:
        raise UnsupportedInput(
            f"the overrides {' '.join(words)!r} are not pairs: {words[-1]!r} is left over. "
            f"Write them as KEY VALUE KEY VALUE, e.g. STEPS 100 LR 0.01."
        )
    for key, text in zip(words[::2], words[1::2], strict=True):
        name, inner = _named(key, settings, "the command line")
        setting = settings[name]
        if inner:
            values[name] = {**values.get(name, {}), inner.lower(): yaml.safe_load(text)}
        elif setting.is_mapping:
            raise UnsupportedInput(f"the override {key} does not name one setting. Write {key}.KEY.")
        else:
            values[name] = setting.convert(text, key)
