"""The manifest of a folder: size and SHA-256 of each of its files, written last, so that damage is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.train.files import flush_to_disk

MANIFEST = "manifest.json"
#: A manifest names a file for each process; whatever is larger is not one, and is not read.
_MOST_BYTES = 10_000_000


class Damaged(Exception):
    """A folder does not hold what its manifest says."""


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    name: str
    size_bytes: int
    sha256: str


def write_manifest(folder: Path, format_version: int, known: Sequence[Written] = ()) -> None:
    """Write the manifest over all files of the folder, and flush everything to disk.

    Of those that are `known`, what they hold is not read again: it is what was meant to be written.
    """
    written = {one.name: one for one in known}
    for path in folder.iterdir():
        written.setdefault(path.name, Written(path.name, path.stat().st_size, _digest(path)))
    files = {name: {"size_bytes": one.size_bytes, "sha256": one.sha256} for name, one in sorted(written.items())}
    (folder / MANIFEST).write_text(_text({"format_version": format_version, "files": files}), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush_to_disk(path)


def format_of(folder: Path) -> int:
    """Return the format version that the folder's manifest says.

    Raises:
        Damaged: there is no manifest, or it is not as `write_manifest` writes it.
    """
    return int(_read(folder)["format_version"])


def check_manifest(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Check that the folder holds these files and all others of its manifest as they were written; return their names.

    Raises:
        Damaged: a file is missing, or has other content.
    """
    files = _read(folder)["files"]
    for name in names:
        if name not in files:
            raise Damaged(f"{MANIFEST} does not name {name}")
    for name in files:
        if Path(name).name != name:
            raise Damaged(f"{MANIFEST} names a file of another folder")
        path = folder / name
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise Damaged(f"{name} is no file")
        try:
            is_same = path.stat().st_size == files[name]["size_bytes"] and _digest(path) == files[name]["sha256"]
        except OSError as problem:
            raise Damaged(f"{name}: {problem.strerror}") from None
        if not is_same:
            raise Damaged(f"{name} is not what was written (its size or digest differs)")
    return list(files)


def _read(folder: Path) -> Any:
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise Damaged(f"{MANIFEST} is no file")
        if path.stat().st_size > _MOST_BYTES:
            raise Damaged(f"{MANIFEST} is too large to be one")
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        if not (isinstance(found["format_version"], int) and _text(found) == text):  # a flipped bit outside the digests
            raise ValueError
        for entry in found["files"].values():
            int(entry["size_bytes"]), str(entry["sha256"])
    except OSError as problem:
        raise Damaged(f"{MANIFEST}: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{MANIFEST} cannot be understood") from None
    return found


def _text(manifest: Any) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
