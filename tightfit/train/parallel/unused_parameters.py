"""Which parameters a step leaves without a gradient: DistributedDataParallel has to know that before the first step."""

from __future__ import annotations

import random
from enum import IntEnum
from typing import Any

import numpy as np
from torch import nn

from tightfit.installation.applied import Applied
from tightfit.interrupts import waiting_interrupts
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step


class UnusedParameters(IntEnum):
    """Which of the parameters that train get no gradient; the larger, the less is known."""

    NONE = 0
    """Each step gives every one a gradient."""
    SAME = 1
    """Each step leaves out the same ones."""
    VARYING = 2
    """Every step may leave out others."""


@waiting_interrupts()
def find_unused_parameters(model: nn.Module, batch: Any, applied: Applied, spec: Step) -> UnusedParameters:
    """Find which parameters steps like the one on `batch` leave out; everything is put back afterwards.

    Steps are alike where no data decide what is computed, as measuring found, and nothing is drawn from Python's or
    NumPy's generators, which decide in the models that skip layers at random.
    """
    profile = applied.profile
    if profile is None or profile.data_dependent:
        return UnusedParameters.VARYING
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = TrainingState(model, spec.all_optimizers, also=(batch, *spec.reached(model)))
    before = _random_state()
    try:
        for parameter in trained:
            parameter.grad = None
        applied.loss(model, batch).backward()
        if _random_state() != before:
            return UnusedParameters.VARYING
        has_all = all(parameter.grad is not None for parameter in trained)
        return UnusedParameters.NONE if has_all else UnusedParameters.SAME
    finally:
        state.restore()


def _random_state() -> tuple[object, ...]:
    """Copy the states of the generators that measuring does not watch."""
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["key"].tobytes(), state["pos"]
