"""How a random program's step ends: losses that reach beyond the model, and several backwards over one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tests.replay.programs import Program, loss_of

Tensor = torch.Tensor
LossFunction = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class LossOf:
    """A loss, with the modules that it reaches beside the model."""

    function: LossFunction
    beside: nn.ModuleDict

    def state(self) -> dict[str, Tensor]:
        """A copy of what those modules hold."""
        return {name: tensor.clone() for name, tensor in self.beside.state_dict().items()}


def plain(_: Program) -> LossOf:
    return LossOf(loss_of, nn.ModuleDict())


def taught(model: Program) -> LossOf:
    """A teacher, whose statistics move, beside a list that the closure appends to."""
    torch.manual_seed(3)
    columns = model.columns
    teacher = nn.Sequential(nn.Linear(columns, columns), nn.BatchNorm1d(columns), nn.Dropout(0.2))
    seen: list[float] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(batch).tanh()
        found = loss_of(model, batch) + F.mse_loss(batch.sin(), target)
        seen.append(0.5)
        return found * seen[-1]

    return LossOf(loss, nn.ModuleDict({"teacher": teacher}))


def judged(model: Program) -> LossOf:
    """A critic, to which gradients flow."""
    torch.manual_seed(4)
    columns = model.columns
    critic = nn.Sequential(nn.Linear(columns, 2 * columns), nn.GELU(), nn.BatchNorm1d(2 * columns))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        scale = loss_of(model, batch)
        return critic(batch * scale.tanh()).pow(2).mean() + scale

    return LossOf(loss, nn.ModuleDict({"critic": critic}))


LOSSES: dict[str, Callable[[Program], LossOf]] = {"plain": plain, "taught": taught, "judged": judged}


def once(model: nn.Module, loss: Tensor) -> None:
    loss.backward()


def twice(model: nn.Module, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def in_parts(model: nn.Module, loss: Tensor) -> None:
    """As those do that ask for the gradients of several losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(0.5 * loss, parameters, retain_graph=True, allow_unused=True)
    loss.backward()
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is not None and parameter.grad is not None:
            parameter.grad.add_(gradient)


BACKWARDS: dict[str, Callable[[nn.Module, Tensor], None]] = {"once": once, "twice": twice, "in parts": in_parts}
