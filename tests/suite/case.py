"""What a model of the suite is: a model, a batch, a loss, and the optimizers that train it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Size = Literal["tiny", "bench"]
#: "tiny": for tests, a step takes milliseconds. "bench": activations are most of the peak.
SIZES: tuple[Size, ...] = ("tiny", "bench")

OptimizerKind = Literal["adamw-foreach", "adamw-fused", "adamw-loop", "sgd"]
OPTIMIZER_KINDS: tuple[OptimizerKind, ...] = ("adamw-foreach", "adamw-fused", "adamw-loop", "sgd")


def make_optimizer(parameters: Sequence[nn.Parameter], kind: OptimizerKind = "adamw-foreach") -> torch.optim.Optimizer:
    """The optimizer in one of its forms."""
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    form = kind.removeprefix("adamw-")
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=form == "foreach", fused=form == "fused" or None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of the suite, ready to train."""

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None
    own_optimizers: Callable[[OptimizerKind], tuple[torch.optim.Optimizer, ...]] | None = None
    """For a model that one optimizer cannot train; it takes the form for what it leaves open."""

    def optimizers(self, kind: OptimizerKind = "adamw-foreach") -> tuple[torch.optim.Optimizer, ...]:
        """New optimizers for the parameters that train."""
        if self.own_optimizers is not None:
            return self.own_optimizers(kind)
        return (make_optimizer([p for p in self.model.parameters() if p.requires_grad], kind),)
