"""What people see while a run is going: a live line in a terminal, plain lines elsewhere, and always the log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tightfit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One logged step."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    step_ms: float
    samples_per_second: float
    memory_now_bytes: int
    """Held after the step: parameters, gradients, optimizer state, batch."""
    peak_bytes: int
    """Measured during this step."""
    budget_bytes: int
    recompute_ratio: float
    """Predicted time of recomputation in parts of the step."""
    gradient_norm: float | None = None
    """Before clipping; None: not clipped."""
    evaluation: Mapping[str, float] | None = None
    """Metrics on held-out data, where the step was followed by an evaluation."""


def format_step(report: StepReport) -> str:
    """One line about a logged step, and one about its evaluation."""
    line = (
        f"step {report.step}/{report.total_steps}  loss {report.loss:.4f}  lr {report.lr:.2e}  {format_rates(report)}  "
        f"memory: {format_memory(report)}"
    )
    if report.evaluation is None:
        return line
    return f"{line}\n  held out: {format_metrics(report.evaluation)}"


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics by name."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())


def format_rates(report: StepReport) -> str:
    """Throughput and time of a logged step."""
    share = f" ({report.recompute_ratio:.0%} recomputing)" if report.recompute_ratio >= 0.005 else ""
    return f"{report.samples_per_second:.1f} samples/s  {report.step_ms:.0f} ms/step{share}"


def format_memory(report: StepReport) -> str:
    """Memory of a logged step."""
    return (
        f"now {format_bytes(report.memory_now_bytes)}, peak {format_bytes(report.peak_bytes)}, "
        f"budget {format_bytes(report.budget_bytes)}"
    )


class Reporter:
    """Tells people on ``stream`` and the run's ``log.txt`` what happens.

    Lines said before `open_log` are kept and written to the log when it is opened.  A quiet one writes to the log only,
    except for what matters at the end.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(file=stream or sys.stdout, soft_wrap=True, highlight=False, markup=False, emoji=False)
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
        self.stop_progress()
        if self._log is not None:
            self._log.close()
            self._log = None

    def open_log(self, path: Path) -> None:
        """From here on, append everything to ``path`` too."""
        self._log = path.open("a", encoding="utf-8", buffering=1)
        for line in self._unwritten:
            self._log.write(line)
        self._unwritten = []

    def say(self, text: str, *, important: bool = False) -> None:
        """Show a line (or several); if this is a quiet reporter, only if it is important."""
        if important or not self._quiet:
            self._console.print(text)
        self._write(text)

    def start_progress(self, done: int, total: int) -> None:
        """Show a live line, if this is a terminal."""
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

    def advance(self, step: int) -> None:
        """Step ``step`` is done, but not logged."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)

    def step(self, report: StepReport) -> None:
        """Show a logged step."""
        line = format_step(report)
        if self._progress is not None and self._task is not None:
            description = f"loss {report.loss:.4f}  lr {report.lr:.2e}  {format_rates(report)}  {format_memory(report)}"
            self._progress.update(self._task, completed=report.step, description=description)
            if report.evaluation is not None:
                self._console.print(f"step {report.step}  held out: {format_metrics(report.evaluation)}")
        elif not self._quiet:
            self._console.print(line)
        self._write(line)

    def stop_progress(self) -> None:
        """Leave the live line as it is."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _write(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        stamped = "".join(f"{stamp}  {line}\n" for line in text.splitlines())
        if self._log is None:
            self._unwritten.append(stamped)
        else:
            self._log.write(stamped)
