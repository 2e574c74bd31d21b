"""Messages on stderr, prefixed with this process's rank."""

from __future__ import annotations

import sys
from contextlib import suppress

_prefix: list[str] = []


def prefix_messages(name: str) -> None:
    """Prefix all further messages with ``name``; empty: with the program's name alone."""
    _prefix[:] = [name] if name else []


def print_message(text: object) -> None:
    """Print a message to stderr; where nobody can read it, that is no reason for another end."""
    with suppress(OSError, ValueError):
        print(": ".join(["tightfit", *_prefix, str(text)]), file=sys.stderr, flush=True)
