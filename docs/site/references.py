"""The references of the documentation site: every command's flags, and every public name, from the code itself."""

from __future__ import annotations

import inspect

import tightfit
from tightfit import errors as all_errors
from tightfit.cli.main import COMMANDS
from tightfit.cli.setting import Setting, settings_of

#: What only those import who have the library.
_CALLBACKS = ("integrations.transformers.TightfitCallback", "integrations.lightning.TightfitCallback")


def command_line() -> str:
    """Return every command with its flags, by group, in Markdown."""
    parts = []
    for command, _ in COMMANDS.values():
        parts.append(f"\n## tightfit {command.name}\n\n{_sentence(command.summary)}\n")
        groups: dict[str, list[Setting]] = {}
        for setting in settings_of(command.options):
            groups.setdefault(setting.group, []).append(setting)
        for group, settings in groups.items():
            parts.append(f"\n### {group} ({command.name})\n\n| flag | meaning |\n|---|---|\n")
            parts += [f"| `{_flag(setting)}` | {_cell(setting.help)} |\n" for setting in settings]
    return "".join(parts)


def public_interface() -> str:
    """Return every public name of the package with its docstring, for autodoc."""
    functions, classes, errors = [], [], []
    for name in tightfit.__all__:
        found = getattr(tightfit, name)
        if inspect.isclass(found):
            (errors if issubclass(found, Exception) else classes).append(name)
        else:
            functions.append(name)
    errors += [
        f"errors.{name}"
        for name, found in vars(all_errors).items()
        if inspect.isclass(found) and found.__module__ == all_errors.__name__ and name not in errors
    ]
    parts = []
    for title, names, directive in (
        ("Functions", functions, "autofunction"),
        ("Classes", classes, "autoclass"),
        ("In other libraries' trainers", _CALLBACKS, "autoclass"),
        ("Errors and warnings", errors, "autoexception"),
    ):
        parts.append(f"\n## {title}\n")
        for name in names:
            options = "" if directive == "autofunction" else "\n   :members:"
            heading = name.removeprefix("integrations.")
            parts.append(f"\n### {heading}\n\n```{{eval-rst}}\n.. {directive}:: tightfit.{name}{options}\n```\n")
    return "".join(parts)


def _flag(setting: Setting) -> str:
    if setting.type is bool:
        return setting.flag
    # Choices are apart, so that a long line of them can be broken.
    return f"{setting.flag} {setting.metavar.replace(',', ', ')}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
