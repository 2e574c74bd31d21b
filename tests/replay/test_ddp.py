"""DistributedDataParallel around a planned model: its own operations are no part of a tape."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tightfit
from tightfit import Applied

BATCH = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
STEPS = 4


class Net(nn.Module):
    """With buffers, which DDP sends around before each forward, and a branch that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU()) for _ in range(3)))
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks(x)
        return found


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Much of it outside the model, where DDP's own operations are, too."""
    return torch.nn.functional.cross_entropy(model(batch).sin().exp(), torch.arange(8) % 6)


def train(ddp: dict[str, bool], *, planned: bool) -> tuple[list[Tensor], Applied | None]:
    """Weights and buffers after some steps of two microbatches each, of which the last exchanges gradients."""
    torch.manual_seed(0)
    model = Net()
    if not ddp:
        del model.unused
    applied = (
        tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full", accumulation_steps=2) if planned else None
    )
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, **ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        for last in (False, True):
            with nullcontext() if last or "static_graph" in ddp else wrapped.no_sync():
                loss = loss_of(wrapped, BATCH) if applied is None else applied.loss(wrapped, BATCH)
                loss.backward()
        optimizer.step()
    return list(model.state_dict().values()), applied


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("ddp", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_every_step_follows_its_plan(ddp: dict[str, bool]) -> None:
    plain, _ = train(ddp, planned=False)
    planned, applied = train(ddp, planned=True)
    assert all(map(torch.equal, plain, planned))
    assert applied is not None
    recipes = {region.key: region.recipe for region in applied.plan.regions}
    assert recipes["<loss>#0/1"] >= 0
    assert applied.statistics.mismatches == 0
    assert applied.statistics.unplanned_calls == 0
    assert applied.statistics.replayed_ops > 0


@pytest.mark.usefixtures("one_process_group")
def test_so_does_one_that_is_begun_by_hand() -> None:
    """In a context of the plan, with operations of the user's before the model runs."""
    model = Net()

    def scaled(model: nn.Module, batch: Tensor) -> Tensor:
        return loss_of(model, batch.mul(0.5).tanh())

    applied = tightfit.fit(model, BATCH, loss=scaled, grad_checkpoint="full")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(3):
        with applied.step(BATCH):
            loss = scaled(wrapped, BATCH)
        loss.backward()
    assert applied.statistics.mismatches == 0
    assert applied.statistics.replayed_ops > 0


class WithLoss(nn.Module):
    """A model and its loss, as people wrap them for DDP; a profiler's mark of their own inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Tensor:
        scaled = batch.mul(0.5).tanh()
        with torch.profiler.record_function("loss"):
            return loss_of(self.model, scaled)


@pytest.mark.usefixtures("one_process_group")
def test_what_ddp_wraps_may_hold_the_loss_too() -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    loss = WithLoss(plain)(BATCH)
    loss.backward()
    applied = tightfit.fit(model, BATCH, loss=lambda m, batch: WithLoss(m)(batch), grad_checkpoint="full")
    assert "<loss>#0/1" in {region.key for region in applied.plan.regions if region.recipe >= 0}
    wrapped = DistributedDataParallel(WithLoss(model), find_unused_parameters=True)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        with applied.step(BATCH):
            loss = wrapped(BATCH)
        loss.backward()
    assert applied.statistics.mismatches == 0
    assert applied.statistics.replayed_ops > 0
    expected = [p.grad for name, p in plain.named_parameters() if not name.startswith("unused")]
    found = [p.grad for name, p in model.named_parameters() if not name.startswith("unused")]
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(expected, found, strict=True))
