"""Backwards inside forward that make a graph (`create_graph=True`): what they save is dropped, too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.replay.helpers import planned
from tightfit.device import memory as meter
from tightfit.errors import ProofWarning
from tightfit.records import EventKind
from tightfit.solver.solver import full_plan

WIDTH = 32


def grad(output: Tensor, inputs: Tensor) -> Tensor:
    return torch.autograd.grad(output, inputs, create_graph=True)[0]


class Block(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.Linear(4 * WIDTH, WIDTH),
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.dropout(F.silu(self.widen(self.norm(x))), self.drop))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.three, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.three(x).unflatten(0, (8, -1)).chunk(3, -1)
        weights = torch.softmax(query @ key.transpose(-1, -2) * WIDTH**-0.5, -1)
        return x + self.out((weights @ value).flatten(0, 1))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        images = x.view(-1, 4, 16, 16)
        return x + self.second(F.elu(self.norm(self.first(images)))).view_as(x)


class Slices(nn.Module):
    """Autograd goes another way back through a write into a view where tensors have no data, as when measuring."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(len(x), 4 * WIDTH)
        hidden[:, : 2 * WIDTH] += self.widen(x)[:, 2 * WIDTH :].sin()
        return x + self.narrow(hidden.tanh())


class Net(nn.Module):
    """Blocks, which can be checkpointed as the rival does."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(WIDTH, 1)
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.out(x)


class Forces(nn.Module):
    """An energy model that differentiates inside its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = Net(Block(), Block(), Block())

    def forward(self, positions: Tensor) -> Tensor:
        positions = positions.detach().requires_grad_()
        return -grad(self.energy(positions).sum(), positions)


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    result = model(x)
    return result.pow(2).mean() + grad(result.pow(2).sum(), x).pow(2).mean()


def forces(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x).pow(2).mean()


def random_directions(model: nn.Module, x: Tensor) -> Tensor:
    """With a `grad_outputs` that forward computes, as estimates of traces have it."""
    x = x.clone().requires_grad_()
    result = model(x)
    directions = torch.randn_like(result).sin()
    (slope,) = torch.autograd.grad(result, x, directions, create_graph=True)
    return slope.pow(2).mean()


def two_penalties(model: nn.Module, x: Tensor) -> Tensor:
    """As WGAN-GP, with a penalty on what is real, too."""
    fake = x.flip(0)
    total = model(fake).mean() - model(x).mean()
    for point in (0.3 * x + 0.7 * fake, x):
        point = point.clone().requires_grad_()
        total = total + (grad(model(point).sum(), point).norm(dim=1) - 1).pow(2).mean()
    return total


def heat_equation(model: nn.Module, x: Tensor) -> Tensor:
    """As PINNs: second derivatives."""
    x = x.clone().requires_grad_()
    u = model(x)
    first = grad(u.sum(), x)
    second = grad(first[:, 0].sum(), x)
    return (first[:, 1] - second[:, 0] + u[:, 0]).pow(2).mean()


def inner_step(model: nn.Module, x: Tensor) -> Tensor:
    """As MAML."""
    weights = dict(model.named_parameters())
    inner = functional_call(model, weights, (x,)).pow(2).mean()
    gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    fast = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    return functional_call(model, fast, (x.flip(0),)).pow(2).mean()


def in_bfloat16(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return penalty(model, x)


def with_hooks(model: Any, x: Tensor) -> Tensor:
    """Hooks on tensors and modules change the gradients of both backwards."""
    seen: list[str] = []

    def after(block: nn.Module, inputs: Any, result: Tensor) -> None:
        def scale(gradient: Tensor) -> Tensor:
            seen.append(type(block).__name__)
            return gradient * (1 + 0.01 * len(seen))

        result.register_hook(scale)

    handles = [block.register_forward_hook(after) for block in model.blocks]
    try:
        return penalty(model, x)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    rows: int = 256
    width: int = WIDTH


CASES = {
    "gradient penalty": Case(lambda: Net(Block(), Block(), Block()), penalty),
    "dropout": Case(lambda: Net(Block(0.1), Block(0.1), Block(0.1)), penalty),
    "forces in forward": Case(Forces, forces),
    "random directions": Case(lambda: Net(Block(), Block()), random_directions),
    "writes into views": Case(lambda: Net(Slices(), Slices(), Slices()), penalty),
    "two penalties": Case(lambda: Net(Block(), Block()), two_penalties),
    "second derivatives": Case(lambda: Net(Block(), Block()), heat_equation),
    "inner step": Case(lambda: Net(Block(), Block(), Block()), inner_step),
    "attention": Case(lambda: Net(Attention(), Attention(), Attention()), penalty),
    "convolutions": Case(lambda: Net(Convolutions(), Convolutions(), Convolutions()), penalty),
    "bfloat16": Case(lambda: Net(Block(), Block(), Block()), in_bfloat16),
    "hooks": Case(lambda: Net(Block(), Block(), Block()), with_hooks),
}


def batch_of(case: Case) -> Tensor:
    return torch.randn(case.rows, case.width, generator=torch.Generator().manual_seed(1))


def step(loss: Callable[..., Tensor], model: nn.Module, batch: Tensor) -> tuple[list[Tensor], int]:
    """The gradients, and the peak."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.manual_seed(7)
    _, peak_bytes = meter.measure_peak(lambda: loss(model, batch).backward(), meter.resident_bytes(model, batch))
    return [parameter.grad.clone() for parameter in model.parameters()], peak_bytes


def checkpointed_peak(model: nn.Module, case: Case) -> int:
    nets = [module for module in model.modules() if isinstance(module, Net)]
    for net in nets:
        net.checkpoints = True
    _, peak_bytes = step(case.loss, model, batch_of(case))
    for net in nets:
        net.checkpoints = False
    return peak_bytes


@pytest.mark.parametrize("name", CASES)
def test_every_plan_has_the_plain_bits_and_its_predicted_peak_and_the_smallest_is_below_checkpointing(
    name: str,
) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, batch = case.make(), batch_of(case)
    plain, plain_bytes = step(case.loss, model, batch)
    profile = tightfit.measure(model, batch, loss=case.loss)
    plans = tightfit.frontier(profile, points=2)
    assert abs(plans[-1].predicted_peak_bytes - plain_bytes) <= 64
    assert plans[0].predicted_peak_bytes < min(0.95 * plain_bytes, 1.02 * checkpointed_peak(model, case))
    for plan in plans[:1]:
        with tightfit.apply(model, plan, step=tightfit.Step(loss=case.loss)) as applied:
            checked, _ = step(applied.loss, model, batch)  # and its replay
            again, peak_bytes = step(applied.loss, model, batch)
        assert all(map(torch.equal, plain, checked))
        assert all(map(torch.equal, plain, again))
        assert -512 <= peak_bytes - plan.predicted_peak_bytes <= 64
        assert applied.statistics.mismatches == 0


def test_fit_keeps_its_budget_and_says_what_it_could_not_compare() -> None:
    case = CASES["gradient penalty"]
    torch.manual_seed(0)
    model, batch = case.make(), batch_of(case)
    profile = tightfit.measure(model, batch, loss=case.loss)
    plans = tightfit.frontier(profile, points=2)
    budget_bytes, enough_bytes = int(plans[0].predicted_peak_bytes * 1.02), 2 * plans[-1].predicted_peak_bytes
    with pytest.warns(ProofWarning, match="cannot be compared alone"):  # nothing less than the step has both backwards
        tightfit.fit(model, batch, budget=budget_bytes, loss=case.loss, profile=profile).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = tightfit.fit(
            model, batch, budget=budget_bytes, loss=case.loss, profile=profile, reference_budget_bytes=enough_bytes
        )
        with fitted as applied:
            assert applied.verdict is not None
            assert applied.verdict.ok
            _, peak_bytes = step(applied.loss, model, batch)
            applied.prepare(batch)
            assert peak_bytes <= budget_bytes
            assert applied.plans is not None
            assert applied.plans.statistics.replanned == 0


def test_a_backward_inside_forward_begins_a_region() -> None:
    case = CASES["second derivatives"]
    profile = tightfit.measure(case.make(), batch_of(case), loss=case.loss)
    assert [region.key for region in profile.regions if "~" in region.key] == ["<loss>#0/1~1", "<loss>#0/1~2"]
    keeping = [event.a for event in profile.events if event.kind == EventKind.KEEPING]
    assert keeping == [1, 0, 1, 0]
    profile.check()


def test_a_graph_that_is_made_outside_of_every_region_holds_what_it_saves() -> None:
    torch.manual_seed(0)
    model, x = Net(Block(), Block()), torch.randn(16, WIDTH).requires_grad_()

    def gradients() -> list[Tensor]:
        slope = grad(model(x).pow(2).sum(), x)
        return list(torch.autograd.grad(slope.pow(2).sum(), list(model.parameters()), allow_unused=True))[:8]

    plain = gradients()
    with planned(model, "blocks.0", "blocks.1"):
        assert all(map(torch.equal, plain, gradients()))


def test_a_write_between_two_backwards_is_refused_as_plain_pytorch_refuses_it() -> None:
    torch.manual_seed(0)
    model = Net(Block(), Block())

    def write(model: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        hidden = torch.tanh(model.blocks[0](x) * 2.0)
        slope = grad((hidden * hidden).sum(), x)
        with torch.no_grad():
            hidden.mul_(1.0)
        return slope.pow(2).mean()

    x = torch.randn(16, WIDTH)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        write(model, x).backward()
    with planned(model, "blocks.0") as installed:
        with installed.region("<loss>"):
            loss = write(model, x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_batched_backward_that_makes_a_graph() -> None:
    """`is_grads_batched`: the rows of a Jacobian in one backward, of which the graph is differentiated again."""
    torch.manual_seed(0)
    model = Net(Block(), Block())

    def loss(model: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        result = model.blocks[1](model.blocks[0](x)).sum(0)[:3]
        rows = torch.autograd.grad(result, x, torch.eye(3), create_graph=True, is_grads_batched=True)[0]
        return rows.pow(2).mean()

    x = torch.randn(16, WIDTH)
    plain, _ = step(loss, model, x)
    with planned(model, "blocks.0", "blocks.1") as installed:

        def inside(model: Any, x: Tensor) -> Tensor:
            with installed.region("<loss>"):
                return loss(model, x)

        again, _ = step(inside, model, x)
    assert all(map(torch.equal, plain, again))


class Products(nn.Module):
    """Autograd's formulas for these ask whether a mode is on, and take another way then."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x).masked_fill(x < 0, self.value)
        return hidden.unflatten(1, (4, -1)).prod(1).repeat(1, 4) * hidden.tanh().cumprod(1) + hidden


def penalty_beside_another(model: nn.Module, x: Tensor) -> Tensor:
    """The first node of the backward inside that runs an operation does not lead to the model's."""
    x = x.clone().requires_grad_()
    result = model(x).pow(2).mean() + x.sin().mean()
    return result + grad(result, x).pow(2).mean()


@pytest.mark.parametrize("loss", [penalty, penalty_beside_another])
@pytest.mark.parametrize("untouched", ["", "blocks.0#0", "blocks.1#0"])
def test_formulas_that_ask_for_modes_are_the_plain_ones(untouched: str, loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, batch = Net(Products(), Products()), torch.randn(64, WIDTH)
    plain, _ = step(loss, model, batch)
    with planned(model, "blocks.0", "blocks.1", recipes={untouched: None} if untouched else None) as installed:

        def inside(model: Any, x: Tensor) -> Tensor:
            with installed.region("<loss>"):
                return loss(model, x)

        again, _ = step(inside, model, batch)
    assert all(map(torch.equal, plain, again))
    assert installed.statistics.dropped_slots


class Keeping(torch.autograd.Function):
    """Keeps tensors as attributes of its context: its inputs, and something that has no history."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.x, ctx.others = x, [y, x.cos()]
        return x.sin() * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]  # PyTorch's signature is wider
        y, cosine = ctx.others
        return gradient * ctx.x.cos() * y + 0.1 * cosine, gradient * ctx.x.sin()


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x).tanh()
        return x + Keeping.apply(hidden.exp(), hidden * 2.0)


def test_a_plan_knows_what_such_formulas_and_contexts_are_in_such_a_backward() -> None:
    """What the formulas compute is not seen; what the contexts keep is dropped, and differentiated again."""
    torch.manual_seed(0)
    model, batch = Net(Products(), Keeps()), torch.randn(64, WIDTH)
    plain, _ = step(penalty, model, batch)
    plan = full_plan(tightfit.measure(model, batch, loss=penalty), 2**40)
    with tightfit.apply(model, plan, step=tightfit.Step(loss=penalty)) as applied:
        for _ in range(2):  # at first with its self-check
            dropped, peak_bytes = step(applied.loss, model, batch)
            assert all(map(torch.equal, plain, dropped))
    assert applied.statistics.mismatches == 0
    assert peak_bytes <= plan.predicted_peak_bytes + 64


def test_what_a_context_keeps_is_dropped_and_has_its_history_again() -> None:
    torch.manual_seed(0)
    model, batch = Keeps(), torch.randn(64, WIDTH)
    plain, _ = step(penalty, model, batch)
    with planned(model, "") as installed:
        again, _ = step(penalty, model, batch)
    assert all(map(torch.equal, plain, again))
    assert installed.statistics.dropped_slots == 5  # of tanh, of exp, and three of the function
