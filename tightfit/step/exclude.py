"""Find the modules that a plan is to leave untouched: given themselves, or by patterns of their paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from tightfit.errors import UnsupportedInput
from tightfit.step.models import name_of

#: Modules, or patterns of paths such as ``layers.*.attn``; one alone, or several.
Exclude = str | torch.nn.Module | Iterable[str | torch.nn.Module]


def excluded_paths(model: torch.nn.Module, exclude: Exclude) -> tuple[str, ...]:
    """Return the paths of the modules that `exclude` names, outermost ones only, in order.

    Raises:
        UnsupportedInput: a pattern matches no module, a module is not the model's, or the model itself is named.
    """
    wanted: list[object] = [exclude]  # what is neither of the three is told below
    if isinstance(exclude, Iterable) and not isinstance(exclude, str | torch.nn.Module):
        wanted = list(exclude)
    if not wanted:
        return ()
    # A module that is in several places has several paths.
    path_of = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    found: set[str] = set()
    for one in wanted:
        if isinstance(one, str):
            paths = {path for path in path_of if fnmatchcase(path, one)}
        else:
            paths = {path for path, module in path_of.items() if module is one}
        if not paths:
            raise _matches_nothing(model, one, list(path_of))
        # With all that is inside: it may be a part of something else, too.
        inside = {module for path in paths for module in path_of[path].modules()}
        found |= {path for path, module in path_of.items() if module in inside}
    return tuple(sorted(path for path in found if not is_inside(path, found - {path})))


def is_inside(path: str, excluded: Iterable[str]) -> bool:
    """Tell whether a module's path is one of the excluded ones or below one."""
    return any(path == one or path.startswith(f"{one}.") for one in excluded)


def _matches_nothing(model: torch.nn.Module, wanted: object, paths: list[str]) -> UnsupportedInput:
    kind = name_of(model)
    if wanted is model or wanted == "":
        return UnsupportedInput(
            f"exclude names the model itself ({kind}), so nothing of it could be planned. A plan is for the rest. "
            "Name modules inside it, or use grad_checkpoint='off', which recomputes nothing."
        )
    if isinstance(wanted, str):
        near = difflib.get_close_matches(wanted, paths, n=4, cutoff=0.4) or paths[:4]
        return UnsupportedInput(
            f"exclude={wanted!r} matches no module of {kind}. What is to be left untouched would be recomputed all the "
            f"same. Give a path or a pattern such as 'layers.*.attn'; paths like it are: {', '.join(near) or 'none'}."
        )
    what = type(wanted).__name__
    return UnsupportedInput(
        f"exclude names a {what} that is no module of {kind}. What is to be left untouched would be recomputed all the "
        f"same. Pass a module that is part of this very model, or a pattern of its path; paths are, for example: "
        f"{', '.join(paths[:4]) or 'none'}."
    )
