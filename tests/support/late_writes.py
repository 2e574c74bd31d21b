"""Checkpoints whose tensors are written by a thread only when the step after the save is over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tightfit.train.checkpoint import Draft
from tightfit.train.loop import OptimizerStep


def written_late(note: Callable[[int, int], object]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what to put in the places of `OptimizerStep.take` and `Draft.write_tensors`.

    `note` is called with the rank and the step of what a thread is about to write late.
    """
    stepped = threading.Event()
    take, write = OptimizerStep.take, Draft.write_tensors

    def taken(self: OptimizerStep, microbatches: Any) -> Any:
        result = take(self, microbatches)
        stepped.set()
        return result

    def late(self: Draft, temporary: Path, rank: int = 0) -> Any:
        if threading.current_thread() is not threading.main_thread():
            stepped.clear()
            assert stepped.wait(60)  # the next step has changed all weights by now
            note(rank, self.step)
        return write(self, temporary, rank)

    return taken, late
