"""Text from files and folders of files."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tightfit.errors import UnsupportedInput
from tightfit.train.data.corpus import Document, TextForm, language_data
from tightfit.train.data.dataset_info import TrainingData
from tightfit.train.data.split import split_by_hash

#: Subset of a corpus that is held out: files of a folder, the end of a single file.
HELD_OUT_SHARE = 0.1

# What of the standard library is not in every installation of the same Python.
_NOT_EVERYWHERE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "ensurepip",
    "__pycache__",
}


def python_source(form: TextForm) -> TrainingData:
    """Load the source of the running Python's own standard library: real text that every machine has.

    About a tenth of the files is held out.
    """
    root, files = python_source_files()
    origin = f"the standard library's source under {root}"
    return _of_files("python-source", files, root, form, origin)


def python_source_files() -> tuple[Path, list[Path]]:
    """Return the folder of the standard library, and the files of it that `python_source` consists of."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_EVERYWHERE]  # site-packages may be huge
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return root, sorted(found, key=lambda path: path.relative_to(root).as_posix())


def text_path(path: Path, form: TextForm) -> TrainingData:
    """Load a text file, or all text files of a folder in the order of their paths.

    In a folder, hidden files and binary files (those with a zero byte in their first 8 KiB) are left out, and about a
    tenth of the files is held out; of a single file it is the last tenth.
    """
    if not path.is_dir():
        whole = _read(path)
        end = int(len(whole) * (1 - HELD_OUT_SHARE))
        while not form.tokens.is_bytes and end < len(whole) and whole[end] & 0xC0 == 0x80:
            end += 1  # not inside a letter of several bytes
        return language_data(
            path.stem,
            [Document(text=whole, origin=str(path))],
            [Document(text=whole[:end], origin=str(path))],
            [Document(text=whole[end:], origin=f"the end of {path}")],
            form=form,
            origin=str(path),
            note="the last tenth",
        )
    files = [
        file
        for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not _is_binary(file)
    ]
    return _of_files(path.resolve().stem, files, path, form, f"the text files under {path}")


def _of_files(name: str, files: Sequence[Path], root: Path, form: TextForm, origin: str) -> TrainingData:
    documents = [Document(text=_read(file), origin=str(file)) for file in files]
    places = split_by_hash((file.relative_to(root).as_posix() for file in files), HELD_OUT_SHARE)
    training, held_out = ([documents[place] for place in part] for part in places)
    return language_data(
        name,
        documents,
        training,
        held_out,
        form=form,
        origin=origin,
        note=f"{len(held_out):,} of {len(files):,} files",
    )


def _is_binary(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return b"\0" in stream.read(8192)
    except OSError as problem:
        raise _unreadable(file, problem) from None


def _unreadable(file: Path, problem: OSError) -> UnsupportedInput:
    return UnsupportedInput(
        f"{file} cannot be read: {problem.strerror}. The dataset needs it. Make the file readable, or name another "
        f"--dataset."
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as problem:
        raise _unreadable(file, problem) from None
