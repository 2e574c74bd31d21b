"""Five steps of a model, plain and inside a budget: equal bits, and no step above the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.promises.training import seed_everything
from tightfit.device import device_for
from tightfit.device.memory import resident_bytes
from tightfit.device.tensor_parts import stored_in
from tightfit.records import Profile

STEPS = 5


@dataclass(frozen=True)
class Peaks:
    """What a step takes at most, in bytes."""

    plain: int
    checkpointed: int
    """With every block checkpointed."""
    smallest: int
    """The smallest budget that a plan is offered for."""
    profile: Profile
    replayed_ops: int
    """In all steps."""


def trained(
    model: nn.Module, batch: Any, loss: Callable[..., Tensor], steps: int = STEPS
) -> tuple[list[dict[str, bytes]], list[int]]:
    """What each of the steps leaves behind, and its peak."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    resident = resident_bytes(model, batch, ())
    left, peaks = [], []

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        value = loss(model, batch)
        value.backward()
        return value.detach()

    seed_everything()
    for _ in range(steps):
        value, peak_bytes = device_for(model).measure_peak(step, resident)
        optimizer.step()
        left.append(_left_behind(model, value))
        peaks.append(peak_bytes)
    return left, peaks


def _left_behind(model: nn.Module, loss: Tensor) -> dict[str, bytes]:
    found = {"loss": loss, "random state": torch.get_rng_state(), **dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        found |= {f"{name} {place}": part for place, part in enumerate(stored_in(parameter))}
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in found.items()
    }


def five_steps(
    make: Callable[[], tuple[nn.Module, Any]],
    loss: Callable[..., Tensor],
    blocks: Callable[[nn.Module], Any],
) -> Peaks:
    """Train plain and at the smallest budget that is offered; asserts equal bits after each step, and the budget.

    Args:
        blocks: the modules of a model that checkpointing every block would checkpoint.
    """
    model, batch = make()
    plain, plain_peaks = trained(model, batch, loss)
    model, batch = make()
    for block in blocks(model):
        own = block.forward
        block.forward = lambda *args, own=own, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    _, checkpointed_peaks = trained(model, batch, loss)
    model, batch = make()
    profile = tightfit.measure(model, batch, loss=loss)
    with pytest.raises(tightfit.BudgetInfeasible) as found:
        tightfit.solve(profile, 1)
    budget = found.value.required_bytes
    applied = tightfit.fit(model, batch, budget=budget, loss=loss, profile=profile, reference_budget_bytes=2**40)
    with applied:
        assert applied.verdict is not None
        assert applied.verdict.ok, applied.verdict
        applied.statistics.reset()
        planned, planned_peaks = trained(model, batch, applied.loss)
        replayed_ops = applied.statistics.replayed_ops
    for number, (one, other) in enumerate(zip(plain, planned, strict=True)):
        assert [name for name in one if one[name] != other[name]] == [], number
    assert max(planned_peaks) <= budget
    return Peaks(
        plain=max(plain_peaks),
        checkpointed=max(checkpointed_peaks),
        smallest=budget,
        profile=profile,
        replayed_ops=replayed_ops,
    )
