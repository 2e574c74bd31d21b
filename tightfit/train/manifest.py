"""The manifest of a folder: size and SHA-256 of each of its files, written last, so that damage is noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tightfit.train.files import flush_to_disk

MANIFEST = "manifest.json"
#: A manifest names a handful of files; whatever is larger is not one, and is not read.
_MOST_BYTES = 100_000


class Damaged(Exception):
    """A folder does not hold what its manifest says."""


def write_manifest(folder: Path, format_version: int) -> None:
    """Write the manifest over all files of the folder, and flush everything to disk."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(_text({"format_version": format_version, "files": files}), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush_to_disk(path)


def format_of(folder: Path) -> int:
    """Return the format version that the folder's manifest says.

    Raises:
        Damaged: there is no manifest, or it is not as `write_manifest` writes it.
    """
    return int(_read(folder)["format_version"])


def check_manifest(folder: Path, names: tuple[str, ...]) -> None:
    """Check that the folder holds these files as they were written.

    Raises:
        Damaged: a file is missing, or has other content.
    """
    files = _read(folder)["files"]
    for name in names:
        if name not in files:
            raise Damaged(f"{MANIFEST} does not name {name}")
        path = folder / name
        try:
            is_same = path.stat().st_size == files[name]["size_bytes"] and _digest(path) == files[name]["sha256"]
        except OSError as problem:
            raise Damaged(f"{name}: {problem.strerror}") from None
        if not is_same:
            raise Damaged(f"{name} is not what was written (its size or digest differs)")


def _read(folder: Path) -> Any:
    path = folder / MANIFEST
    try:
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
