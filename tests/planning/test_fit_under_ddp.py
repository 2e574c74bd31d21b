"""`fit` once DistributedDataParallel has wrapped the model: no reducer remembers the backwards of planning.

In a group of one process.  A communication hook multiplies what is averaged, so that a gradient which is not averaged
has other bits than in the plain training.  What several processes do is in tests/train/parallel/test_ddp.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

import tightfit
from tightfit.errors import UnsupportedInput

BATCH = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
STATIC, UNUSED = {"static_graph": True}, {"find_unused_parameters": True}
VIEWS = {"gradient_as_bucket_view": True}


class Net(nn.Module):
    """With a branch that some steps leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3)))
        self.branch = nn.Linear(8, 8)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        found: Tensor = self.blocks(x)
        return found + self.branch(found) if branch else found


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    found = model(*batch) if isinstance(batch, tuple) else model(batch)
    return found.square().mean()  # type: ignore[no-any-return]  # calls of modules are not annotated


def wrap(model: Net, **options: Any) -> tuple[DistributedDataParallel, list[int]]:
    """DDP with a communication hook, and how many buckets that was given."""
    buckets: list[int] = []

    def hook(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket.index())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer().mul_(3))
        return future

    hook.__annotations__ = {}  # DDP compares them to classes, and here they are text
    wrapped = DistributedDataParallel(model, **options)
    wrapped.register_comm_hook(None, hook)
    return wrapped, buckets


def train(wrapped: nn.Module, loss: Callable[[nn.Module, Any], Tensor], quiet: Any = None) -> list[Tensor]:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        with quiet() if quiet is not None and step % 2 == 0 else nullcontext():
            loss(wrapped, BATCH).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in wrapped.parameters()]


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("which", ["what is wrapped", "the wrapper"])
@pytest.mark.parametrize("options", [{}, STATIC, UNUSED, STATIC | VIEWS, UNUSED | VIEWS], ids=str)
def test_training_after_it_is_the_plain_one(options: dict[str, bool], which: str) -> None:
    plain, expected = wrap(Net(), **options)
    model = Net()
    wrapped, buckets = wrap(model, **options)
    given = wrapped if which == "the wrapper" else model
    applied = tightfit.fit(given, BATCH, loss=loss_of, grad_checkpoint="full")
    assert buckets == []
    assert all(parameter.grad is None for parameter in model.parameters())
    quiet = None if "static_graph" in options else (plain.no_sync, wrapped.no_sync)
    assert all(
        map(
            torch.equal,
            train(plain, loss_of, quiet and quiet[0]),
            train(wrapped, applied.loss, quiet and quiet[1]),
        )
    )
    assert buckets == expected
    assert len(buckets) > 0
    assert applied.statistics.replayed_ops > 0


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("frozen", ["nothing", "before the wrapper", "with the wrapper"])
def test_a_wrapper_is_found_whatever_the_collector_was_told_to_leave_alone(frozen: str) -> None:
    """`fit` itself has it leave alone what was there before, if nobody else had."""
    plain, expected = wrap(Net(), **STATIC)
    model = Net()
    gc.unfreeze()
    if frozen == "before the wrapper":
        gc.freeze()
    wrapped, buckets = wrap(model, **STATIC)
    if frozen == "with the wrapper":
        gc.freeze()
    applied = tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full")
    assert (gc.get_freeze_count() > 0) is (frozen != "nothing")
    assert all(map(torch.equal, train(plain, loss_of), train(wrapped, applied.loss)))
    assert buckets == expected


@pytest.mark.usefixtures("one_process_group")
def test_so_it_is_where_the_first_step_has_to_be_planned_anew() -> None:
    plain, expected = wrap(Net(), **STATIC)
    model = Net()
    applied = tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full")
    wrapped, buckets = wrap(model, **STATIC)
    for one in (plain, wrapped):
        one.eval()  # another state of the model, which is tried in a real step
    assert all(map(torch.equal, train(plain, loss_of), train(wrapped, applied.loss)))
    assert buckets == expected
    assert applied.plans is not None
    assert applied.plans.statistics.tried == 1


@pytest.mark.usefixtures("one_process_group")
def test_what_planning_used_does_not_count_as_used() -> None:
    """DDP leaves the gradient of what no process has used as it is."""
    model = Net()
    wrapped = DistributedDataParallel(model, **UNUSED)
    tightfit.fit(model, (BATCH, True), loss=loss_of, grad_checkpoint="full").remove()
    loss_of(wrapped, (BATCH, False)).backward()
    assert model.branch.weight.grad is None
    assert model.blocks[0][0].weight.grad is not None


@pytest.mark.usefixtures("one_process_group")
def test_the_four_verbs_take_the_wrapper() -> None:
    wrapped, _ = wrap(Net(), **STATIC)
    profile = tightfit.measure(wrapped, BATCH, loss=loss_of)
    plan = tightfit.solve(profile, budget_bytes=2**30)
    assert tightfit.verify(wrapped, BATCH, plan, loss=loss_of).ok
    with tightfit.apply(wrapped, plan):
        loss_of(wrapped, BATCH).backward()


@pytest.mark.usefixtures("one_process_group")
def test_a_reducer_that_cannot_be_put_back_is_refused() -> None:
    from torch.nn.parallel.distributed import _MixedPrecision

    model = Net()
    wrapped = DistributedDataParallel(model, **STATIC)
    wrapped.mixed_precision = _MixedPrecision(param_dtype=torch.bfloat16)
    with pytest.raises(UnsupportedInput, match="before the model is wrapped"):
        tightfit.fit(model, BATCH, loss=loss_of)
