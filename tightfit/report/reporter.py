"""Progress of a run: a live line in a terminal, plain lines elsewhere, and always the log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tightfit.report.lasting_stream import LastingStream
from tightfit.report.phase_bar import showing_phases
from tightfit.report.step_report import StepReport, format_memory, format_rates, format_step
from tightfit.report.text import format_metrics


class Reporter:
    """Prints a run's lines to ``stream`` and to its ``log.txt``.

    Lines from before `open_log` are kept and written when the log is opened.  A quiet reporter writes to the log only,
    except for important lines.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._quiet = quiet
        lasting = LastingStream(stream or sys.stdout, self._note_loss)
        self._console = Console(file=cast(IO[str], lasting), soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._unwritten: list[str] = []
        self._log: TextIO | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._write(f"ended by {type(error).__name__}: {error}")
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
            self._log = None

    def open_log(self, path: Path) -> None:
        """Append everything to ``path``, too, from here on."""
        self._log = path.open("a", encoding="utf-8", buffering=1)
        for line in self._unwritten:
            self._log.write(line)
        self._unwritten = []

    def say(self, text: str, *, important: bool = False) -> None:
        """Print one or more lines; a quiet reporter only logs those that are not important."""
        if important or not self._quiet:
            self._console.print(text)
        self._write(text)

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """Show a live line inside the context, if this is a terminal; it then stays as it was last."""
        if self._console.is_terminal and not self._quiet:
            self._progress = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total, completed=done)
            self._progress.start()
        try:
            yield
        finally:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None

    @contextmanager
    def phases(self) -> Iterator[None]:
        """Show how far planning is inside the context, if this is a terminal."""
        with nullcontext() if self._quiet else showing_phases(self._console):
            yield

    def advance(self, step: int) -> None:
        """Note that step ``step`` is done, but not logged."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def step(self, report: StepReport) -> None:
        """Print a logged step."""
        line = format_step(report)
        if self._progress is not None and self._task is not None:
            description = f"loss {report.loss:.4f}  lr {report.lr:.2e}  {format_rates(report)}  {format_memory(report)}"
            self._progress.update(self._task, completed=report.step, description=description)
            if report.evaluation is not None:
                self._console.print(f"step {report.step}  held out: {format_metrics(report.evaluation)}")
        elif not self._quiet:
            self._console.print(line)
        self._write(line)

    def _note_loss(self, why: str) -> None:
        self._write(f"what is printed is lost from here on ({why}); the run goes on, and this file has all of it")

    def _write(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        stamped = "".join(f"{stamp}  {line}\n" for line in text.splitlines())
        if self._log is None:
            self._unwritten.append(stamped)
        else:
            with suppress(OSError):  # the disk is full: a line of the log is no reason to end a run
                self._log.write(stamped)
