"""Weights that are tensor subclasses, as quantisation makes them, and jagged tensors: memory, budgets and bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.promises.training import seed_everything
from tightfit.device import memory as meter
from tightfit.errors import BudgetInfeasible
from tightfit.records import Profile
from tightfit.solver.solver import full_plan

WIDTH = 64
BATCH = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1))


class Quantised(torch.Tensor):
    """A frozen weight of integers and a scale for each row."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)  # type: ignore[attr-defined, no-any-return]  # no stub has it

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> Quantised:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], _: None, size: Any, stride: Any) -> Quantised:
        return cls(parts["values"], parts["scale"])

    def dequantised(self) -> Tensor:
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = [a.dequantised() if isinstance(a, Quantised) else a for a in args]
        return func(*plain, **(kwargs or {}))


class OfFunctions(Quantised):
    """Handles the function that modules call, as torchao's weights do, instead of what that is made of."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantised(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


class Adapted(nn.Module):
    """A frozen quantised weight, and a trained one of low rank beside it."""

    def __init__(self, kind: type[Quantised], inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(kind.of(torch.randn(outside, inside) / inside**0.5), requires_grad=False)
        self.down = nn.Linear(inside, 4, bias=False)
        self.up = nn.Linear(4, outside)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, kind: type[Quantised]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.widen = Adapted(kind, WIDTH, 4 * WIDTH)
        self.narrow = Adapted(kind, 4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.widen(self.norm(x))))


class Net(nn.Module):
    def __init__(self, kind: type[Quantised]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for _ in range(5))
        self.is_checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        return x


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def made(kind: type[Quantised]) -> Net:
    seed_everything()
    model = Net(kind)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return model


def step(model: nn.Module, loss: Any, batch: Any = BATCH) -> tuple[list[Tensor], int]:
    """The gradients, and the peak."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    resident = meter.resident_bytes(model, batch)
    _, peak_bytes = meter.measure_peak(lambda: loss(model, batch).backward(), resident)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], peak_bytes


def smallest_budget(profile: Profile) -> int:
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.solve(profile, budget_bytes=1)
    return caught.value.required_bytes


def test_resident_memory_is_that_of_the_parts() -> None:
    model = made(OfFunctions)
    frozen = sum(p.values.nbytes + p.scale.nbytes for p in model.parameters() if isinstance(p, Quantised))
    trained = sum(2 * p.nbytes for p in model.parameters() if not isinstance(p, Quantised))
    assert meter.resident_bytes(model, BATCH) == frozen + trained + BATCH.nbytes
    profile = tightfit.measure(model, BATCH, loss=loss_of)
    assert profile.baseline_bytes == frozen + trained + BATCH.nbytes


@pytest.mark.parametrize("kind", [OfFunctions, Quantised])
def test_budgets_and_bits_with_quantised_weights(kind: type[Quantised]) -> None:
    model = made(kind)
    plain, plain_bytes = step(model, loss_of)
    profile = tightfit.measure(model, BATCH, loss=loss_of)
    assert abs(tightfit.solve(profile, 2**40).predicted_peak_bytes / plain_bytes - 1) <= 0.005
    smallest_bytes = smallest_budget(profile)
    for budget_bytes in (smallest_bytes, (smallest_bytes + plain_bytes) // 2, 2 * plain_bytes):
        with tightfit.fit(model, BATCH, budget=budget_bytes, loss=loss_of, reference_budget_bytes=2**40) as applied:
            assert applied.verdict is not None
            assert applied.verdict.ok, applied.verdict.differing
            planned, peak_bytes = step(model, applied.loss)
        assert all(map(torch.equal, plain, planned))
        assert peak_bytes <= budget_bytes
    model.is_checkpointed = True
    _, checkpoint_bytes = step(model, loss_of)
    if kind is OfFunctions:  # of the other kind, what the weights are multiplied to is kept
        assert smallest_bytes <= checkpoint_bytes


class Sealed(torch.Tensor):
    """Wraps another, and does not say by PyTorch's flatten protocol what."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Sealed:
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)  # type: ignore[attr-defined, no-any-return]  # no stub has it

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Sealed, lambda tensor: tensor.inside, (args, kwargs or {}))
        return tree_map_only(Tensor, Sealed, func(*args, **kwargs))


class Seal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Sealed(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].inside if isinstance(gradients[0], Sealed) else gradients[0]


class Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Sealed) -> Tensor:
        return x.inside.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return Sealed(gradients[0])


class SealedBlock(nn.Module):
    """Computes with wrappers, and has a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(Sealed(torch.rand(2 * WIDTH)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(Seal.apply(self.widen(x))) * self.scale
        return x + self.narrow(Open.apply(hidden))


def test_wrappers_without_the_flatten_protocol_are_counted_and_dropped() -> None:
    seed_everything()
    model = Net(OfFunctions)
    model.blocks = nn.ModuleList(SealedBlock() for _ in range(3))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    plain, plain_bytes = step(model, loss_of)
    profile = tightfit.measure(model, BATCH, loss=loss_of)
    assert tightfit.solve(profile, 2**40).predicted_peak_bytes == plain_bytes
    smallest_bytes = smallest_budget(profile)
    with tightfit.fit(model, BATCH, budget=smallest_bytes, loss=loss_of, reference_budget_bytes=2**40) as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok, applied.verdict.differing
        planned, peak_bytes = step(model, applied.loss)
    assert all(map(torch.equal, plain, planned))
    assert peak_bytes <= smallest_bytes
    model.is_checkpointed = True
    _, checkpoint_bytes = step(model, loss_of)
    assert smallest_bytes <= checkpoint_bytes


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4))
        self.is_checkpointed = False

    def forward(self, rows: tuple[Tensor, ...]) -> Tensor:
        x = torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x))
        return torch.cat([part.mean(0, keepdim=True) for part in x.unbind()]).pow(2).mean()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_jagged_tensors_are_counted_and_dropped_and_the_smallest_budget_that_is_named_is_kept() -> None:
    def loss(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        result: Tensor = model(rows)
        return result

    seed_everything()
    rows = tuple(torch.randn(length, 32) for length in (50, 170, 90))
    model = Ragged()
    plain, plain_bytes = step(model, loss, rows)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    plain, plain_bytes = step(model, loss, rows)
    profile = tightfit.measure(model, rows, loss=loss)
    assert abs(tightfit.solve(profile, 2**40).predicted_peak_bytes / plain_bytes - 1) <= 0.01
    smallest_bytes = smallest_budget(profile)
    with tightfit.fit(model, rows, budget=smallest_bytes, loss=loss, reference_budget_bytes=2**40) as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        planned, peak_bytes = step(model, applied.loss, rows)
    assert all(map(torch.equal, plain, planned))
    assert peak_bytes <= smallest_bytes
    model.is_checkpointed = True
    _, checkpoint_bytes = step(model, loss, rows)
    assert smallest_bytes <= checkpoint_bytes < plain_bytes


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_jagged_tensor_that_is_written_after_it_was_saved_is_refused_as_always() -> None:
    class Writing(Ragged):
        writes = False

        def forward(self, rows: tuple[Tensor, ...]) -> Tensor:
            x = torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
            for block in self.blocks:
                wide = block[0](x)
                x = x + block[2](block[1](wide))
                if self.writes:
                    with torch.no_grad():
                        wide.mul_(1.5)
            return torch.cat([part.mean(0, keepdim=True) for part in x.unbind()]).pow(2).mean()

    def loss(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        result: Tensor = model(rows)
        return result

    rows = tuple(torch.randn(length, 32) for length in (5, 17, 9))
    model = Writing()
    plan = full_plan(tightfit.measure(model, rows, loss=loss), 2**40)
    with tightfit.apply(model, plan):
        loss(model, rows).backward()
        model.writes = True
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss(model, rows).backward()
