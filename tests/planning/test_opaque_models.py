"""Models of fused kernels: a plan saves at least what checkpointing every block does, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.support.fused_kernels import FusedAttention, FusedGate, FusedNorm
from tightfit.device import device_for
from tightfit.device.memory import resident_bytes
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.columns import keeping
from tightfit.solver.plan_builder import build_plan
from tightfit.step.model import give_gradients

WIDTH, HEADS, BLOCKS = 32, 4, 4


@torch.library.custom_op("tightfit_tests::squash", mutates_args=())
def squash(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(x.detach().numpy())) * 1.0


@squash.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


squash.register_autograd(
    lambda ctx, grad: grad * (1 - ctx.saved_tensors[0] ** 2),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


class Block(nn.Module):
    """A Llama layer of such parts."""

    def __init__(self, norm: Any, attend: Callable[..., Tensor], gated: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.attend, self.gated = norm, attend, gated
        self.weights = nn.ParameterList(torch.ones(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x, self.weights[0])).view(n, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(n, t, d))
        y = self.norm(x, self.weights[1])
        return x + self.down(self.gated(self.gate(y), self.up(y)))


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), weight)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger() -> Block:
    return Block(lambda x, weight: FusedNorm.apply(x, weight, 1e-6), plain_attention, FusedGate.apply)


def flash_attn() -> Block:
    return Block(plain_norm, lambda q, k, v: FusedAttention.apply(q, k, v, None, True), plain_gate)


def library() -> Block:
    return Block(plain_norm, plain_attention, lambda gate, up: squash(gate) * up)


class Net(nn.Module):
    def __init__(self, make: Callable[[], Block]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for _ in range(BLOCKS))
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return x.pow(2).mean()


def peak_bytes(model: Net, batch: Tensor) -> int:
    """The measured peak of a step without a plan."""
    give_gradients(model)
    resident = resident_bytes(model, batch, ())
    return device_for(model).measure_peak(lambda: model(batch).backward(), resident)[1]


@pytest.mark.parametrize("make", [liger, flash_attn, library])
def test_a_plan_saves_what_checkpointing_every_block_saves(make: Callable[[], Block]) -> None:
    batch = torch.randn(4, 32, WIDTH)
    model = Net(make)
    plain = peak_bytes(model, batch)
    model.checkpoints = True
    checkpointed = peak_bytes(model, batch)
    model.checkpoints = False
    profile = tightfit.measure(model, batch)
    with pytest.raises(tightfit.BudgetInfeasible) as smallest:
        tightfit.solve(profile, 1)
    budget = smallest.value.required_bytes
    assert plain - budget >= 0.9 * (plain - checkpointed)
    applied = tightfit.fit(model, batch, budget=budget, profile=profile, reference_budget_bytes=2**30)
    with applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert applied.verdict.measured_peak_bytes <= budget
        assert applied.verdict.mismatches == 0


def test_what_reads_the_result_of_a_call_that_stays_is_dropped() -> None:
    """The call is not written down, and its result's memory was handed out inside it."""
    batch, model = torch.randn(4, 32, WIDTH), Net(liger)
    profile = tightfit.measure(model, batch)
    index = ProfileIndex(profile)
    region = next(number for number, one in enumerate(profile.regions) if one.key == "blocks.2#0")

    def makers(value: int) -> set[str]:
        op = profile.ops[profile.values[value].op]
        read = [profile.values[one].op for one in op.inputs]
        return {profile.signatures[profile.ops[one].signature].name for one in read if one >= 0}

    optional = sorted(index.facts[region].optional)
    dropped = [value for value in optional if any("FusedNorm" in name for name in makers(value))]
    assert dropped
    decisions = [None] * len(profile.regions)
    decisions[region] = keeping(index, [value for value in optional if value not in dropped])
    plan = build_plan(index, decisions, 2**40)
    give_gradients(model)
    with tightfit.apply(model, plan) as applied:
        for _ in range(2):
            resident = resident_bytes(model, batch, ())
            peak = device_for(model).measure_peak(lambda: applied.loss(model, batch).backward(), resident)[1]
            assert peak <= plan.predicted_peak_bytes
        assert applied.statistics.dropped_slots >= len(dropped)


def test_a_function_that_gives_other_bits_each_time_is_kept_and_named() -> None:
    class Restless(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            Restless.calls += 1
            out = torch.empty_like(x)
            out.numpy()[...] = x.detach().numpy() + 1e-3 * (Restless.calls % 5)
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] + 0 * ctx.saved_tensors[0]

    model = Net(lambda: Block(plain_norm, plain_attention, lambda gate, up: Restless.apply(gate * up)))
    profile = tightfit.measure(model, torch.randn(2, 8, WIDTH))
    names = [profile.signatures[op.signature].name for op in profile.ops]
    reasons = {op.keep_reason for name, op in zip(names, profile.ops, strict=True) if "Restless" in name}
    assert all("other bits" in reason for reason in reasons)


def counts_calls(x: Tensor, state: Tensor) -> Tensor:
    state.detach().numpy()[...] += 1
    return torch.from_numpy(np.tanh(x.detach().numpy()))


def rectifies_its_argument(x: Tensor, state: Tensor) -> Tensor:
    array = x.detach().numpy()
    np.maximum(array, 0, out=array)
    return x * 2.0


def draws_of_numpy(x: Tensor, state: Tensor) -> Tensor:
    return x * torch.from_numpy((np.random.rand(*x.shape) > 0.1).astype(np.float32))


@pytest.mark.parametrize(
    "kernel",
    [
        counts_calls,
        pytest.param(rectifies_its_argument, marks=pytest.mark.exhaustive),
        pytest.param(draws_of_numpy, marks=pytest.mark.exhaustive),
    ],
)
def test_around_an_operator_that_does_more_than_it_says_modules_are_called_again(
    kernel: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """The operator alone must not run again; its module may, as what it moves is put back."""
    name = f"tightfit_tests::{kernel.__name__}"
    lying = torch.library.custom_op(name, kernel, mutates_args=())
    lying.register_fake(lambda x, state: torch.empty_like(x))
    lying.register_autograd(
        lambda ctx, grad: (grad * (ctx.saved_tensors[0] != 0), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    )

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(lying(self.up(x), self.calls))

    batch, model = torch.randn(64, WIDTH), Net(Counting)  # type: ignore[arg-type]  # any block
    for _ in range(2):  # the second one knows from the first what the operator does
        profile = tightfit.measure(model, batch)  # which finds out, so that the budget is not refused
        assert profile.method == "fake"
        assert profile.unproven == ()
        budget = tightfit.frontier(profile, points=2)[0].budget_bytes
        with tightfit.fit(model, batch, budget=budget, reference_budget_bytes=2**30) as applied:
            assert applied.verdict is not None
            assert applied.verdict.ok
            assert applied.verdict.measured_peak_bytes <= budget
            assert {recipe.lever for recipe in applied.plan.recipes} == {"module"}
            plan = applied.plan
            assert plan.plain_peak_bytes - budget >= 0.3 * (plan.plain_peak_bytes - plan.baseline_bytes)
