"""Completion of commands and flags in shells, written by shtab (the extra ``completion``) from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tightfit.errors import UnsupportedInput

PRINT_COMPLETION = "--print-completion"
SHELLS = ("bash", "zsh", "tcsh", "fish")


def completion_script(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """Return the script that a shell has to read; `words` name the shell.

    Raises:
        UnsupportedInput: no shell or an unknown one is named, or shtab is not installed.
    """
    if len(words) != 1 or words[0] not in SHELLS:
        raise UnsupportedInput(
            f"{PRINT_COMPLETION} {' '.join(words)}".rstrip() + f" names no shell that is known here. "
            f"Give one of {', '.join(SHELLS)}."
        )
    try:
        import shtab
    except ModuleNotFoundError:
        raise UnsupportedInput(
            "shtab is not installed, and it writes the completion. "
            "Install it with `pip install 'tightfit[completion]'`."
        ) from None
    if words[0] not in shtab.SUPPORTED_SHELLS:
        raise UnsupportedInput(
            f"the installed shtab writes no completion for {words[0]}. Install a newer one, or give one of "
            f"{', '.join(shtab.SUPPORTED_SHELLS)}."
        )
    return str(shtab.complete(parser, shell=words[0]))
