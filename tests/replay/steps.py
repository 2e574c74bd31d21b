"""A few training steps of a random program, and everything that they leave behind."""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.replay.helpers import snapshot
from tests.replay.programs import Program
from tests.replay.step_kinds import BACKWARDS, LOSSES, LossOf

Tensor = torch.Tensor


def steps(
    model: Program,
    batch: Tensor,
    context: Any = None,
    count: int = 3,
    *,
    loss_of: LossOf | None = None,
    backwards: str = "once",
) -> dict[str, Any] | str:
    """A few SGD steps from the model's first state; what they leave, or the name of the error that they raise."""
    used = loss_of if loss_of is not None else LOSSES["plain"](model)
    torch.manual_seed(0)
    random.seed(0)
    model.reset()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state_beside = used.state()
    found: dict[str, Any] = {}
    try:
        for number in range(count):
            model.zero_grad()
            used.beside.zero_grad()
            if context is None:
                loss = used.function(model, batch)
            else:
                with context.step():
                    loss = used.function(model, batch)
            BACKWARDS[backwards](model, loss)
            found |= {f"{number}: {name}": value for name, value in snapshot(model, loss).items()}
            found |= {f"{number}, beside: {name}": value for name, value in snapshot(used.beside, loss).items()}
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
        found["calls"] = torch.tensor([model.steps, model.block.calls])
    except RuntimeError as error:
        return type(error).__name__
    finally:
        model.load_state_dict(state)
        used.beside.load_state_dict(state_beside)
    return found
