"""The learning rate as a function of the step alone, so that there is nothing to save or restore."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


def lr_at(
    step: int, *, total_steps: int, highest: float, schedule: ScheduleName, warmup_steps: int, min_ratio: float
) -> float:
    """Return the learning rate of step ``step`` (the first is 0).

    It rises linearly over ``warmup_steps`` and reaches ``highest`` with the last of them; then it stays, or falls
    linearly or by half a cosine (Loshchilov & Hutter 2017) to ``min_ratio`` of that at the last step.

    >>> lr_at(0, total_steps=10, highest=1.0, schedule="linear", warmup_steps=2, min_ratio=0.0)
    0.5
    >>> lr_at(9, total_steps=10, highest=1.0, schedule="cosine", warmup_steps=2, min_ratio=0.25)
    0.25
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    if schedule == "constant":
        return highest
    steps_left = total_steps - warmup_steps
    progress = min(1.0, (step - warmup_steps + 1) / steps_left) if steps_left > 0 else 1.0
    share = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return highest * (min_ratio + (1 - min_ratio) * share)
