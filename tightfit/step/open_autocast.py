"""Plan a step inside an autocast context that is open around it, as one that opens the context itself.

PyTorch forgets the weights that it has cast when the outermost context closes, which is the user's.  What the runs for
planning cast must not be found by the user's own step, nor by each other: else these run other operations.  A context
that stays open over several forwards forgets them, too, when one of these has to be planned.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.step.step import Step


class _InOpenAutocast(Step):
    """A step that finds, and leaves, no cast weights; around all of it the context is open, as around the user's."""

    def run_loss(self, model: Any, batch: Any) -> torch.Tensor:
        torch.clear_autocast_cache()
        try:
            with self._autocast(model):
                return super().run_loss(model, batch)
        finally:
            torch.clear_autocast_cache()


def as_it_runs_now(step: Step, model: torch.nn.Module) -> Step:
    """Return the step as it runs now: an autocast context that is open counts as the step's own."""
    ambient = device_for(model).ambient_autocast()
    if ambient is None:
        return step
    settings = {one.name: getattr(step, one.name) for one in fields(step) if one.init}
    return _InOpenAutocast(**{**settings, "autocast": ambient})


def without_open_autocast(model: torch.nn.Module | torch.device) -> AbstractContextManager[object]:
    """Close the autocast context that is open for a model, or on a device, if one is.

    Only then: inside any open context, be it a disabled one, the model's own contexts do not forget at their end the
    weights that they have cast, and the step that is measured would run other operations than the user's.
    """
    device = device_for(model)
    return device.autocast(None) if device.ambient_autocast() is not None else nullcontext()
