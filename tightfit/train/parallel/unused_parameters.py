"""Which parameters a step gives a gradient: what DistributedDataParallel has to know before it exchanges any."""

from __future__ import annotations

import random
from enum import IntEnum
from typing import Any

import numpy as np
from torch import nn

import tightfit
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step


class Reach(IntEnum):
    """Of all parameters that train; the larger, the less is known."""

    ALL = 0
    """Each step reaches every one."""
    SAME = 1
    """Each step reaches the same ones."""
    VARYING = 2
    """Every step may reach others."""


def reach_of(model: nn.Module, batch: Any, applied: tightfit.Applied, spec: Step) -> Reach:
    """Which parameters steps like the one on `batch` give a gradient; everything is put back afterwards.

    Steps are alike where no data decide what is computed, as measuring found, and nothing is drawn from Python's or
    NumPy's generators, which decide in the models that skip layers at random.
    """
    profile = applied.profile
    if profile is None or profile.data_dependent:
        return Reach.VARYING
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = TrainingState(model, spec.optimizers, also=(batch,))
    before = _drawn()
    try:
        for parameter in trained:
            parameter.grad = None
        applied.loss(model, batch).backward()
        if _drawn() != before:
            return Reach.VARYING
        return Reach.ALL if all(parameter.grad is not None for parameter in trained) else Reach.SAME
    finally:
        state.restore()


def _drawn() -> tuple[object, ...]:
    """Where the generators are that measuring does not watch."""
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["key"].tobytes(), state["pos"]
