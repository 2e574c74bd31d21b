"""A model with a budget that only recomputing keeps, for batches of several lengths."""

from __future__ import annotations

import torch
from torch import nn

import tightfit
from tests.replay.helpers import differences
from tests.support.shape_models import Tensor, batch_of, gradients, next_word_loss, peak_of
from tightfit.installation.plans import PlanStatistics
from tightfit.planning.plan_cache import PlanCache

SHORT, MIDDLE, LONG = 40, 48, 64


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Of few operations, so that measuring a step is quick."""
    return torch.optim.AdamW(model.parameters(), fused=True)


class Case:
    """A model with a budget that only recomputing keeps, at every length from `SHORT` on."""

    def __init__(self, model: nn.Module, budget_bytes: int, length: int = MIDDLE) -> None:
        self.model = model
        self.budget_bytes = budget_bytes
        self.optimizer = adamw(model)
        self.applied = tightfit.fit(
            model, batch_of(length), budget=budget_bytes, loss=next_word_loss, optimizer=self.optimizer,
            reference_budget_bytes=2**40,
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    @property
    def plans(self) -> PlanCache:
        assert isinstance(self.applied.plans, PlanCache)
        return self.applied.plans

    @property
    def counts(self) -> PlanStatistics:
        return self.plans.statistics

    def loss(self, batch: Tensor) -> Tensor:
        return self.applied.loss(self.model, batch)

    def peak(self, batch: Tensor) -> int:
        self.applied.prepare(batch)
        return peak_of(self.model, batch, self.optimizer, lambda: self.loss(batch))

    def assert_gradients_are_plain(self, batch: Tensor) -> None:
        """And that the step was really planned."""
        with self.applied.paused():
            plain = gradients(self.model, lambda: next_word_loss(self.model, batch))
        self.applied.statistics.reset()
        planned = gradients(self.model, lambda: self.loss(batch))
        assert differences(plain, planned) == []
        assert self.applied.statistics.replayed_ops > 0
