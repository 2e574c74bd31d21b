"""Progress of measuring, solving and proving as a live line in a terminal, with the time that a phase still takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tightfit.progress import heard_by

#: The line is drawn by whoever says something, at most so often: a thread of its own would disturb what is timed.
_EVERY_S = 0.2


@contextmanager
def showing_phases(console: Console) -> Iterator[None]:
    """Show what is said by `tightfit.progress` inside the context, if this is a terminal; nothing of it stays."""
    if not console.is_terminal:
        yield
        return
    bar = Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.description}{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left", style="progress.remaining"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    shown: dict[str, TaskID] = {}
    drawn_s = 0.0

    def listen(phase: str, done: int, total: int) -> None:
        nonlocal drawn_s
        is_new = phase not in shown
        if is_new:
            for task in shown.values():
                bar.remove_task(task)
            shown.clear()
            shown[phase] = bar.add_task(phase, total=total or None, count="")
        count = f" {done:,} of {total:,}" if total else ""
        bar.update(shown[phase], completed=done, total=total or None, count=count)
        now_s = time.monotonic()
        if is_new or now_s - drawn_s >= _EVERY_S:
            drawn_s = now_s
            bar.refresh()

    with bar, heard_by(listen):
        yield
