"""Names that people type: registries of them, suggestions for typing errors, and names made safe for folders."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from tightfit.errors import UnsupportedInput

Entry = TypeVar("Entry")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence naming the closest of ``known``, with a leading space; empty if none is close.

    >>> did_you_mean("gtp", ["gpt", "lstm"])
    " Did you mean 'gpt'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def folder_name(spec: str) -> str:
    """Return ``spec`` with everything that does not belong in a folder's name replaced by ``-``.

    >>> folder_name("my.models:build_net")
    'my.models-build_net'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", spec).strip("-.") or "unnamed"


class Registry(Generic[Entry]):
    """Entries by name. Looking up an unknown name raises with the closest one."""

    def __init__(self, noun: str, entries: Mapping[str, Entry], elsewhere: str) -> None:
        self._noun = noun
        self._entries = dict(entries)
        self._elsewhere = elsewhere

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return iter(self._entries.items())

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise UnsupportedInput(
                f"there is no {self._noun} {name!r}.{did_you_mean(name, self._entries)} "
                f"Known names: {', '.join(self._entries)}; {self._elsewhere}."
            )
        return self._entries[name]
