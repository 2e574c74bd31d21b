"""A microbatch travels with its weight, and everything that looks at batches sees through it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tightfit
from tightfit._torch_private.dispatch import FakeTensor, FakeTensorMode
from tightfit.device.memory import resident_bytes
from tightfit.profiling.structural_copy import copy_batch
from tightfit.step.batch import batch_tensors, describe_batch
from tightfit.step.key import ModelWatch, step_key
from tightfit.step.microbatch import Microbatch
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step
from tightfit.train.data.loader import to_device

BATCH = {"input": torch.arange(8.0).reshape(2, 4), "scale": 2.0}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(batch["input"]).pow(2).mean()
    return loss


def test_the_loss_and_its_gradients_are_multiplied_by_the_weight() -> None:
    model, step = nn.Linear(4, 1), Step(loss=loss_of)
    whole = step.run_loss(model, BATCH)
    weighted = step.run_loss(model, Microbatch(BATCH, 0.25))
    assert torch.equal(weighted, whole * 0.25)
    (gradient,) = torch.autograd.grad(weighted, [model.weight])
    assert torch.equal(gradient, torch.autograd.grad(whole * 0.25, [model.weight])[0])


@pytest.mark.parametrize("batch", [torch.ones(2, 4), (torch.ones(2, 4),), {"input": torch.ones(2, 4)}])
def test_without_a_loss_function_the_batch_inside_is_unpacked(batch: object) -> None:
    class Mean(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the name that nn.Linear gives it
            return super().forward(input).mean()

    model, step = Mean(4, 1), Step()
    assert torch.equal(step.run_loss(model, Microbatch(batch, 0.5)), step.run_loss(model, batch) * 0.5)


def test_a_batch_that_is_not_split_is_not_multiplied() -> None:
    model, step = nn.Linear(4, 1), Step(loss=loss_of)
    assert type(step.run_loss(model, Microbatch(BATCH)).grad_fn).__name__.startswith("MeanBackward")


def test_descriptions_tensors_and_copies_are_those_of_the_batch_inside() -> None:
    microbatch = Microbatch(BATCH, 0.5)
    assert describe_batch(microbatch) == describe_batch(BATCH)
    assert [tensor is BATCH["input"] for tensor in batch_tensors([microbatch])] == [True]
    model = nn.Linear(4, 1)
    assert resident_bytes(model, [microbatch]) == resident_bytes(model) + BATCH["input"].nbytes
    moved = to_device(microbatch, torch.device("cpu"))
    assert (moved.weight, moved.batch["input"] is BATCH["input"]) == (0.5, True)
    fake = copy_batch(microbatch, FakeTensorMode())
    assert (fake.weight, type(fake.batch["input"])) == (0.5, FakeTensor)


def test_a_snapshot_puts_the_batch_inside_back() -> None:
    batch = torch.arange(4.0)
    state = TrainingState(nn.Linear(1, 1), (), also=(Microbatch(batch, 0.5),))
    batch.zero_()
    state.restore()
    assert torch.equal(batch, torch.arange(4.0))


def test_the_weight_decides_nothing_about_a_plan_but_that_there_is_one() -> None:
    watch = ModelWatch(nn.Linear(4, 1))
    batches = (BATCH, Microbatch(BATCH), Microbatch(BATCH, 0.5), Microbatch(BATCH, 0.25))
    plain, whole, half, quarter = (step_key(watch, batch) for batch in batches)
    assert plain == whole
    assert half == quarter
    assert whole != half
    assert whole.sizes == half.sizes


def test_fit_plans_one_shape_for_all_microbatches() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    with tightfit.fit(model, Microbatch(BATCH, 0.5), loss=loss_of, budget="1GiB") as applied:
        assert applied.verdict is not None
        assert applied.verdict.gradients_equal
        plain = Step(loss=loss_of).run_loss(model, BATCH)
        assert torch.equal(applied.loss(model, Microbatch(BATCH, 0.25)), plain * 0.25)
        assert len(applied.plans) == 1  # type: ignore[arg-type]  # what `fit` puts there has a length
