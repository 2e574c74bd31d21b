"""Atomic writes: a file is written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends without an error, the file there replaces ``path`` atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either its old content or all of the new, whatever happens."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Append to a file, and have it on disk before going on; where that fails, the file is as it was."""
    with path.open("ab", buffering=0) as stream:
        before_bytes = stream.tell()
        try:
            rest = memoryview(text.encode("utf-8"))
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(before_bytes)
            raise


def remove_temporary(folder: Path) -> list[Path]:
    """Remove what a killed process left behind: names that begin with a dot and end with ``.tmp``.

    Returns what cannot be removed now, for example because another process reads it on a network's disk: that is no
    reason to fail.
    """
    left = []
    for path in folder.glob(".*.tmp"):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:
            left.append(path)
    return left


def flush_to_disk(path: Path) -> None:
    """Ask the system to have ``path`` (a file or a folder) on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
