"""Training a case for a few steps from a fixed start, and what that leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.suite.case import Case, OptimizerKind
from tightfit.device import memory as meter
from tightfit.replay.contents import same_bits
from tightfit.step.model import give_gradients
from tightfit.step.snapshot import RandomState
from tightfit.step.step import Step


@dataclass
class Outcome:
    """What a few steps left behind."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Loss and gradients of each step, parameters and buffers after the last."""
    peaks_bytes: list[int] = field(default_factory=list)
    random_state: RandomState | None = None

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks_bytes)

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not bit for bit the same."""
        assert self.tensors.keys() == other.tensors.keys()
        names = [name for name, tensor in self.tensors.items() if not same_bits(tensor, other.tensors[name])]
        assert self.random_state is not None
        assert other.random_state is not None
        return names if self.random_state.equals(other.random_state) else [*names, "random state"]


def settle(case: Case, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
    """Gradients are resident and optimizer state is allocated, as in every step but the first."""
    for parameter in case.model.parameters():
        parameter.grad = None
    give_gradients(case.model)
    for optimizer in optimizers:
        optimizer.step()


def train(
    case: Case,
    steps: int,
    *,
    loss: Callable[[], torch.Tensor] | None = None,
    kind: OptimizerKind = "adamw-foreach",
    metered: bool = True,
) -> Outcome:
    """Optimizer steps from the case's weights and a fixed seed; `loss` computes it in another way, under a plan."""
    torch.manual_seed(0)
    random.seed(0)
    optimizers = case.optimizers(kind)
    spec = Step(loss=case.loss, optimizer=optimizers)
    model = case.model
    settle(case, optimizers)
    found = Outcome()

    def step() -> torch.Tensor:
        result = loss() if loss is not None else spec.run_loss(model, case.batch)
        result.backward()
        spec.run_optimizers(model)
        return result.detach()

    for number in range(steps):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        if metered:
            value, peak = meter.measure_peak(step, meter.resident_bytes(model, case.batch, optimizers))
            found.peaks_bytes.append(peak)
        else:
            value = step()
        found.tensors[f"loss of step {number}"] = value
        found.tensors |= {
            f"gradient of {name} in step {number}": p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    found.tensors |= {f"parameter {name}": p.detach().clone() for name, p in model.named_parameters()}
    found.tensors |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    found.random_state = RandomState()
    return found
