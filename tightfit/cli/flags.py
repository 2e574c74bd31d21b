"""Command-line flags, derived from frozen dataclasses.

Each field becomes a flag: its name (``batch_size`` is ``--batch-size``, and ``--batch_size`` works too), its type, its
default, and the docstring under it as help.  Values come from, each going before the one before it: the dataclass, the
YAML file of ``--config-file``, flags, and ``KEY VALUE`` pairs at the end of the line.

Built on argparse.  jsonargparse and tyro were tried on this contract: jsonargparse knows only the underscore spelling
of derived flags, no bare ``--grad-checkpoint`` and no hints for typing errors; tyro silently loses ``KEY VALUE`` pairs
that follow a flag with an optional value, and has no configuration file.  Bending either is longer than these modules.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from tightfit.cli.overrides import apply_overrides, key_of, parse_pairs, read_config_file, split_pairs
from tightfit.cli.setting import settings_of
from tightfit.errors import UnsupportedInput

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
    passed_on: str | None = None
    """A field for all words after the one that stands alone: they are somebody else's, flags among them."""

    def add_to(self, parsers: argparse._SubParsersAction[Parser], *, flags: bool) -> None:
        """Add the command's parser; its ``flags`` are needed only if it is the one that is run."""
        parser = parsers.add_parser(self.name, help=self.summary, description=self.summary, allow_abbrev=False)
        if flags:
            self._add_flags(parser)

    def _add_flags(self, parser: Parser) -> None:
        parser.add_argument("--config-file", metavar="FILE", help="YAML file with any of the settings below")
        words = "[KEY VALUE ...]" if self.alone is None else self.alone.upper()
        words += "" if self.passed_on is None else f" [{self.passed_on.upper()} ...]"
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
                action="append" if setting.is_repeatable else "store",
                metavar=setting.metavar,
                nargs="+" if setting.is_mapping else "?" if setting.name in self.bare else None,
                const=self.bare.get(setting.name),
                help=setting.help.replace("%", "%%"),
            )

    def split(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Split what follows the command's name into its own words and those that are passed on."""
        if self.passed_on is None:
            return list(words), []
        takes_none = {setting.flag for setting in settings_of(self.options) if setting.type is bool} | {"--help", "-h"}
        place = 0
        while place < len(words) and words[place].startswith("-"):
            place += 1 if words[place] in takes_none or "=" in words[place] else 2
        return list(words[: place + 1]), list(words[place + 1 :])

    def parse(self, found: argparse.Namespace, rest: Sequence[str], passed_on: Sequence[str] = ()) -> Options:
        """Make the options from parsed flags, the words that were left over, and those that are passed on.

        Raises:
            UnsupportedInput: an unknown flag or key, or a value that does not fit.
        """
        settings = {setting.name: setting for setting in settings_of(self.options)}
        overrides = list(rest)
        values: dict[str, Any] = {}
        if self.passed_on is not None:
            values[self.passed_on] = tuple(passed_on)
        if self.alone is not None and len(overrides) == 1:
            values[self.alone] = overrides.pop()
        if found.config_file is not None:
            values.update(read_config_file(Path(found.config_file), settings))
        for name, setting in settings.items():
            given = getattr(found, name)
            if given is None:
                continue
            if setting.is_mapping:
                pairs, misplaced = split_pairs(given)
                overrides = misplaced + overrides
                values[name] = {**values.get(name, {}), **parse_pairs(pairs, setting.flag)}
            else:
                values[name] = setting.convert(given, setting.flag)
        apply_overrides(values, overrides, settings)
        return self.options(**values)


class Parser(argparse.ArgumentParser):
    """argparse's parser, raising errors instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as bad input."""
        raise UnsupportedInput(f"the command line cannot be understood: {message}. See `{self.prog} --help`.")


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
            if word in bare_flags and {key_of(part) for part in following.split(".")} & set(keys):
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
