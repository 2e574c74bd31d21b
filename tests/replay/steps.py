"""A few training steps of a random program, and everything that they leave behind."""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.replay.helpers import snapshot
from tests.replay.programs import Program, loss_of

Tensor = torch.Tensor


def steps(model: Program, batch: Tensor, context: Any = None, count: int = 3) -> dict[str, Any] | str:
    """A few SGD steps from the model's first state; what they leave, or the name of the error that they raise."""
    torch.manual_seed(0)
    random.seed(0)
    model.reset()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found: dict[str, Any] = {}
    try:
        for number in range(count):
            model.zero_grad()
            if context is None:
                loss = loss_of(model, batch)
            else:
                with context.step():
                    loss = loss_of(model, batch)
            loss.backward()
            found |= {f"{number}: {name}": value for name, value in snapshot(model, loss).items()}
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
        found["calls"] = torch.tensor([model.steps, model.block.calls])
    except RuntimeError as error:
        return type(error).__name__
    finally:
        model.load_state_dict(state)
    return found
