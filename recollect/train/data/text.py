"""Text as bytes: a corpus is one long row of bytes, cut into sequences that follow each other."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from recollect.errors import UnsupportedInput
from recollect.train.data.facts import DataFacts, TrainingData
from recollect.train.data.split import divided

#: Every byte is a token.
VOCABULARY_SIZE = 256

#: Part of a corpus that is held out: files of a folder, the end of a single file.
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


class ByteSequences:
    """Sample ``i`` holds bytes ``i * length`` to ``(i + 1) * length``, the last one included: it is the next input's
    first byte and this sample's last target.
    """

    def __init__(self, corpus: bytes, sequence_length: int) -> None:
        self._corpus = torch.frombuffer(bytearray(corpus), dtype=torch.uint8) if corpus else torch.empty(0)
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, (len(self._corpus) - 1) // self._sequence_length)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self._sequence_length
        return self._corpus[start : start + self._sequence_length + 1].long()


def python_source(sequence_length: int) -> TrainingData:
    """The source of the running Python's own standard library: real text that every machine has.

    About a tenth of the files is held out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
        if not _NOT_EVERYWHERE.intersection(path.relative_to(root).parts)
    ]
    return _text("python-source", files, root, sequence_length, f"the standard library's source under {root}")


def text_path(path: Path, sequence_length: int) -> TrainingData:
    """A text file, or all text files of a folder in the order of their paths.

    In a folder, hidden files and binary files (those with a zero byte in their first 8 KiB) are left out, and about a
    tenth of the files is held out; of a single file it is the last tenth.
    """
    if not path.is_dir():
        return _text(path.stem, [path], path.parent, sequence_length, str(path))
    files = [
        file
        for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not _is_binary(file)
    ]
    return _text(path.resolve().stem, files, path, sequence_length, f"the text files under {path}")


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


def _text(name: str, files: Sequence[Path], root: Path, sequence_length: int, origin: str) -> TrainingData:
    pieces = [_read(file) for file in files]
    if len(files) > 1:
        chosen = divided((file.relative_to(root).as_posix() for file in files), HELD_OUT_SHARE)
        training, held_out = (b"\n".join(pieces[place] for place in places) for places in chosen)
        note = f"{len(chosen[1]):,} of {len(files):,} files"
    else:
        whole = b"".join(pieces)
        end = int(len(whole) * (1 - HELD_OUT_SHARE))
        training, held_out = whole[:end], whole[end:]
        note = "the last tenth"
    if len(training) <= sequence_length or len(held_out) <= sequence_length:  # too little to hold any of it out
        training, held_out = b"\n".join(pieces), b""
    samples, evaluation = (ByteSequences(corpus, sequence_length) for corpus in (training, held_out))
    if len(samples) == 0:
        raise UnsupportedInput(
            f"{origin} holds {len(training)} bytes of text, but one sample alone takes {sequence_length + 1}. "
            f"Name a longer text as --dataset, or give a smaller --sequence-length."
        )
    digest = hashlib.sha256(len(training).to_bytes(8, "big") + training + held_out).hexdigest()
    return TrainingData(
        name=name,
        samples=samples,
        held_out=evaluation if len(evaluation) else None,
        facts=DataFacts(kind="text", vocabulary_size=VOCABULARY_SIZE, bytes_per_token=1.0),
        fingerprint=f"text:{sequence_length}:{digest}",
        description=f"{origin}: {len(training):,} bytes, {len(samples):,} sequences of {sequence_length} bytes"
        + (f"; held out: {note}, {len(held_out):,} bytes" if len(evaluation) else ""),
    )
