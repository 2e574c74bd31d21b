"""The metrics of logged steps on disk: ``metrics.jsonl`` always, TensorBoard's files on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tightfit.errors import UnsupportedInput, remedy_for
from tightfit.train.files import append_text


class TensorBoardWriter:
    """Writes every number of a logged step as a curve for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        writer = import_tensorboard()
        self._writer = writer(log_dir=str(folder))

    def add(self, step: int, metrics: Mapping[str, Any], prefix: str = "") -> None:
        """Add a point to the curve of each number."""
        for name, value in metrics.items():
            if isinstance(value, Mapping):
                self.add(step, value, f"{prefix}{name}/")
            elif isinstance(value, int | float) and name not in ("step", "epoch"):
                self._writer.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def import_tensorboard() -> Any:
    """Return PyTorch's writer for TensorBoard.

    Raises:
        UnsupportedInput: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise UnsupportedInput(
            "--tensorboard needs the tensorboard package, which is not installed. "
            "Install it with: pip install 'tightfit[tensorboard]'"
        ) from None
    return SummaryWriter


class MetricsFile:
    """Writes ``metrics.jsonl``: one object for each logged step.

    What cannot be written now, because the disk is full, is kept and written with what comes later.
    """

    def __init__(self, path: Path, tensorboard: Path | None, say: Callable[[str], None]) -> None:
        self._path = path
        self._tensorboard = TensorBoardWriter(tensorboard) if tensorboard is not None else None
        self._say = say
        self._unwritten: list[str] = []

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Append one object."""
        was_full = bool(self._unwritten)
        self._unwritten.append(json.dumps(metrics, allow_nan=False) + "\n")
        try:
            self.flush()
        except OSError as problem:
            if not was_full:
                self._say(
                    f"{self._path} could not be written ({problem.strerror}). The run goes on, and writes these lines "
                    f"when it can. {remedy_for(str(problem))}."
                )
        if self._tensorboard is not None:
            self._tensorboard.add(metrics["step"], metrics)

    def flush(self) -> None:
        """Write what is not written yet; raises OSError where that is not possible."""
        if self._unwritten:
            append_text(self._path, "".join(self._unwritten))
            self._unwritten = []
