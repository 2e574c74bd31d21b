"""A loss that somebody computes himself: does it save what was measured?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tightfit.operators.region_names import LOSS
from tightfit.records import Plan, Profile
from tightfit.replay.installed import Installed
from tightfit.replay.saved_bytes import SavedBytes
from tightfit.replay.values import Kept
from tightfit.step.batch import batch_tensors


@contextmanager
def looking_at_own_loss(
    model: torch.nn.Module,
    batch: Any,
    plan: Plan,
    profile: Profile,
    installed: Installed | None,
    tell: Callable[[int], object],
) -> Iterator[None]:
    """Compare what model and loss save inside with the profile; tell by how many bytes it is too much for the budget.

    `installed`: what the model's regions run under, so that only the loss is looked at; None where all runs plain.
    """
    saved = SavedBytes([*model.parameters(), *model.buffers(), *batch_tensors(batch)])
    if installed is not None:
        planned_bytes = profile.saved_bytes(only=LOSS)
        installed.loss_saves = saved
        try:
            yield
        finally:
            installed.loss_saves = None
    else:
        planned_bytes = profile.saved_bytes()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, Kept.read):
            yield
    more_bytes = saved.nbytes - planned_bytes
    if plan.predicted_peak_bytes + more_bytes > plan.budget_bytes:
        tell(more_bytes)
