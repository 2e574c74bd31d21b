"""Training twice, plain and under a plan, as a user would write it, and comparing every bit after every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tightfit
from tightfit.records import Plan, Profile, Verdict
from tightfit.step.step import Step

Loss = Callable[[nn.Module, Any], Tensor]
Snapshot = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Two trainings that were the same, bit for bit, after each step."""

    plain: nn.Module
    planned: nn.Module
    plan: Plan
    profile: Profile
    verdict: Verdict
    steps: list[Snapshot]
    replayed_ops: int
    """In all steps together."""
    mismatches: int

    @property
    def dropped_bytes(self) -> int:
        """What autograd saves in the plain step and the plan does not hold."""
        return sum(self.plan.recipes[region.recipe].dropped_bytes for region in self.plan.regions if region.recipe >= 0)

    def kept_reasons(self) -> set[str]:
        """Why operations' results are kept, whatever the budget."""
        return {op.keep_reason for op in self.profile.ops if op.keep_reason}


def seed_everything(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused: one operation for all parameters, so that a measured step is quick."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Fewer operations, so that a measured step is quick: for tests whose subject is not the optimizer."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def snapshot(model: nn.Module, loss: Tensor) -> Snapshot:
    """Everything that a step may leave behind."""
    found: Snapshot = {"loss": loss.detach().clone()}
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = parameter.detach().clone()
        found[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = buffer.clone()
    found["torch random state"] = torch.get_rng_state()
    found["python random state"] = random.getstate()
    found["numpy random state"] = repr(np.random.get_state(legacy=False)["state"])
    return found


def train(
    model: nn.Module, batches: Sequence[Any], loss: Loss, optimizer: torch.optim.Optimizer, *, seed: int = 0
) -> list[Snapshot]:
    """One optimizer step for each batch."""
    seed_everything(seed)
    steps = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=False)
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        steps.append(snapshot(model, value))
    return steps


def differences(plain: list[Snapshot], other: list[Snapshot]) -> list[str]:
    """What is not bit for bit the same, by step."""
    assert len(plain) == len(other)
    found = []
    for step, (a, b) in enumerate(zip(plain, other, strict=True), 1):
        assert a.keys() == b.keys()
        found += [f"step {step}: {name}" for name in a if not _same(a[name], b[name])]
    return found


def same_training(
    make: Callable[[], nn.Module],
    batches: Sequence[Any],
    loss: Loss | None = None,
    *,
    budget: int | str | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    drops: bool = True,
) -> Trained:
    """Train plain and planned, one step for each batch; asserts that each step leaves the same bits.

    Args:
        make: builds the model, the same one each time.
        batches: the first one is what the plan is made for.
        loss: as for `tightfit.fit`.
        budget: None: everything is recomputed that can be, the hardest test.
        drops: whether the plan is expected to recompute anything.
    """
    plain, planned = make(), make()
    steps = train(plain, batches, Step(loss=loss).run_loss, optimizer(plain))
    seed_everything(1)
    planned_optimizer = optimizer(planned)
    with tightfit.fit(
        planned,
        batches[0],
        loss=loss,
        optimizer=planned_optimizer,
        budget=budget,
        grad_checkpoint="full" if budget is None else "auto",
        reference_budget_bytes=2**40,
    ) as applied:
        applied.statistics.reset()
        under_plan = train(planned, batches, applied.loss, planned_optimizer)
        replayed_ops, mismatches = applied.statistics.replayed_ops, applied.statistics.mismatches
    assert differences(steps, under_plan) == []
    assert applied.verdict is not None
    assert applied.profile is not None
    assert applied.verdict.gradients_equal, applied.verdict
    assert applied.verdict.buffers_equal, applied.verdict
    assert applied.verdict.rng_equal, applied.verdict
    assert applied.installed is False
    assert drops == (replayed_ops > 0), (replayed_ops, applied.plan.recipes)
    return Trained(
        plain=plain,
        planned=planned,
        plan=applied.plan,
        profile=applied.profile,
        verdict=applied.verdict,
        steps=steps,
        replayed_ops=replayed_ops,
        mismatches=mismatches,
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and _bits(a) == _bits(b)
    return bool(a == b)


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
