"""The saved state of an optimizer is checked before it is loaded: a checkpoint may be made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tightfit.train.optimizer_state import require_state_of
from tightfit.train.optimizers import OPTIMIZERS, make_optimizer


def stepped(name: Any) -> torch.optim.Optimizer:
    """After a step of a matrix, a vector, a number and something that gets no gradient."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    optimizer = make_optimizer(name, model, lr=0.1, weight_decay=0.1, momentum=0.9, beta2=0.99)
    (model[0](torch.ones(2, 3)).sum() * model.scale).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_its_own_and_no_other_s(name: str) -> None:
    optimizer = stepped(name)
    require_state_of(optimizer, optimizer.state_dict())
    for other in OPTIMIZERS:
        if {name, other} not in ({"adam", "adamw"}, {name}):
            with pytest.raises(ValueError, match=r"of another optimizer|cannot be|does not fit"):
                require_state_of(stepped(other), optimizer.state_dict())


def test_sgd_without_momentum_has_none() -> None:
    model = nn.Linear(2, 1)
    optimizer = make_optimizer("sgd", model, lr=0.1, weight_decay=0.0, momentum=0.0, beta2=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    require_state_of(optimizer, optimizer.state_dict())


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a group more": lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
    "betas of words": lambda saved: saved["param_groups"][0].update(betas=["a", "b"]),
    "three betas": lambda saved: saved["param_groups"][0].update(betas=[0.9, 0.9, 0.9]),
    "eps that is infinite": lambda saved: saved["param_groups"][0].update(eps=float("inf")),
    "amsgrad of a number": lambda saved: saved["param_groups"][0].update(amsgrad=3),
    "a parameter that is not there": lambda saved: saved["state"].update({9: saved["state"][0]}),
    "a parameter below 0": lambda saved: saved["state"].update({-1: saved["state"][0]}),
    "a parameter with a name": lambda saved: saved["state"].update({"a": saved["state"][0]}),
    "an average gone": lambda saved: saved["state"][0].pop("exp_avg"),
    "an average of another shape": lambda saved: saved["state"][0].update(exp_avg=torch.zeros(3, 2)),
    "an average of whole numbers": lambda saved: saved["state"][0].update(exp_avg=torch.zeros(2, 3).long()),
    "an average that is a number": lambda saved: saved["state"][0].update(exp_avg=1.0),
    "steps of each element": lambda saved: saved["state"][0].update(step=torch.zeros(2, 3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_made_up_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    """It ended in a traceback in the first step, or computed something else."""
    optimizer = stepped("adamw")
    saved = optimizer.state_dict()
    change(saved)
    with pytest.raises(ValueError, match="the optimizer"):
        require_state_of(optimizer, saved)
