"""Who speaks: of several processes, each says which one it is."""

from __future__ import annotations

import sys

_speaker: list[str] = []


def speak_as(name: str) -> None:
    """From now on, what is told to people begins with ``name``; empty: with the program's name alone."""
    _speaker[:] = [name] if name else []


def tell(text: object) -> None:
    """Tell people on stderr."""
    print(": ".join(["tightfit", *_speaker, str(text)]), file=sys.stderr)
