"""The two loops that are compared: one by hand, and the one that `tightfit train` runs between two logged steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from tightfit.train import Workload
from tightfit.train.data.loader import to_device
from tightfit.train.loop import OptimizerStep

Loop = Callable[[], list[float]]
"""Takes steps; returns when each of them ended."""


def by_hand(work: Workload, model: nn.Module, loader: Iterable[Any]) -> Loop:
    """As people write it; `model`: the workload's, perhaps wrapped."""

    def run() -> list[float]:
        ends = []
        for batch in loader:
            work.optimizer.zero_grad(set_to_none=False)
            loss: Tensor = work.task.loss(model, to_device(batch, work.device))
            loss.backward()
            work.optimizer.step()
            ends.append(time.perf_counter())
        return ends

    return run


def by_trainer(optimizer_step: OptimizerStep, steps: int) -> Loop:
    """As `tightfit train` takes steps between two logged ones."""

    def run() -> list[float]:
        ends = []
        for microbatches in optimizer_step.work.stream(0, steps):
            optimizer_step.take(microbatches)
            ends.append(time.perf_counter())
        return ends

    return run
