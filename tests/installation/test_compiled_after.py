"""`torch.compile` on a model, a block or a step that has a plan: the budget is kept, and what is lost is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import tightfit
from tests.support.chains import ResidualMLP
from tightfit.device import memory as meter
from tightfit.errors import PromiseWarning

BATCH = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
EAGERLY: dict[str, Any] = {"backend": "aot_eager"}
Compiled = Callable[[Tensor], Tensor]


def model_of() -> ResidualMLP:
    torch.manual_seed(0)
    return ResidualMLP(3)


@contextmanager
def planned() -> Iterator[tuple[ResidualMLP, tightfit.Applied]]:
    torch._dynamo.reset()
    model = model_of()
    with tightfit.fit(model, BATCH, grad_checkpoint="full") as applied:
        yield model, applied


def around(model: ResidualMLP) -> Compiled:
    compiled: Compiled = torch.compile(model, **EAGERLY)
    return compiled


def in_place(model: ResidualMLP) -> Compiled:
    model.compile(**EAGERLY)
    return model


def blocks(model: ResidualMLP) -> Compiled:
    for block in model.blocks:
        block.compile(**EAGERLY)
    return model


def what_calls_it(model: ResidualMLP) -> Compiled:
    compiled: Compiled = torch.compile(lambda x: model(x), **EAGERLY)
    return compiled


def step(call: Compiled, model: nn.Module) -> list[Tensor]:
    model.zero_grad(set_to_none=False)
    call(BATCH).backward()  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("compiled", [around, in_place, blocks, what_calls_it])
def test_the_budget_is_kept_and_that_nothing_is_compiled_is_told_once(compiled: Any) -> None:
    plain = model_of()
    expected = step(plain, plain)
    with planned() as (model, applied):
        call = compiled(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                assert all(map(torch.equal, step(call, model), expected))
            resident = meter.resident_bytes(model, BATCH)
            _, peak_bytes = meter.measure_peak(lambda: call(BATCH).backward(), resident)  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
        assert peak_bytes <= applied.plan.predicted_peak_bytes
        assert applied.statistics.mismatches == applied.statistics.unplanned_calls == 0
        told = [str(one.message) for one in caught if one.category is PromiseWarning]
        assert len(told) == 1
        assert "nothing in it is compiled" in told[0]


@pytest.mark.filterwarnings("ignore:torch.compile was called:tightfit.errors.PromiseWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at what forward returned
def test_the_loss_around_it_is_recomputed_by_its_plan_too() -> None:
    """The session of the step ends the model's region, and begins the loss's, inside the compiled call."""

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) + batch.sin().exp() * model.head.bias).exp().sum()  # type: ignore[no-any-return, operator, union-attr]  # as `ResidualMLP` has it

    torch._dynamo.reset()
    plain, model = model_of(), model_of()
    expected = step(lambda batch: loss_of(plain, batch), plain)
    with tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full") as applied:
        assert any(region.key.startswith("<loss>") and region.recipe >= 0 for region in applied.plan.regions)
        model.compile(**EAGERLY)
        for _ in range(3):
            assert all(map(torch.equal, step(lambda batch: applied.loss(model, batch), model), expected))
        assert applied.statistics.mismatches == 0


def test_a_compiler_that_may_not_break_says_why() -> None:
    with planned() as (model, _):
        compiled = torch.compile(model, fullgraph=True, **EAGERLY)
        with pytest.raises(RuntimeError, match="tightfit has planned this model"):
            compiled(BATCH)


def test_without_gradients_it_is_compiled() -> None:
    with planned() as (model, _), torch.no_grad():
        expected = model(BATCH)
        counter = CompileCounter()
        assert torch.equal(torch.compile(model, backend=counter)(BATCH), expected)
        assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_it_can_be_exported(strict: bool) -> None:
    with planned() as (model, applied):
        exported = torch.export.export(model, (BATCH,), strict=strict).module()
        assert torch.equal(exported(BATCH), model(BATCH))
        applied.statistics.reset()
        step(model, model)
        assert applied.statistics.replayed_ops > 0
