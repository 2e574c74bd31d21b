"""Models that `fully_shard` (FSDP2) has wrapped, in a group of one process: measured, planned and put back.

What several processes exchange is in tests/train/parallel/test_fsdp.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import tightfit
from tightfit.distributed.fsdp import is_sharded, process_group_of
from tightfit.distributed.process_group import SINGLE_PROCESS
from tightfit.errors import UnsupportedInput
from tightfit.step.fingerprint import fingerprint

BATCH = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(32, 128), nn.Linear(128, 32), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(nn.functional.gelu(self.up(x)))
        return x + self.down(hidden)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out.square().mean()


def sharded(mesh: DeviceMesh, **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard([model.norm, model.head], mesh=mesh)  # one unit of two modules
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_a_plan_keeps_its_budget_and_the_bits(mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    model = sharded(mesh, reshard_after_forward=reshard_after_forward)
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: parameter.to_local().clone() for name, parameter in model.named_parameters()}
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    keys = list(model.state_dict())
    with tightfit.fit(model, BATCH, optimizer=optimizer) as applied:
        plain = applied.verdict
    assert plain is not None
    assert plain.measured_peak_bytes == plain.predicted_peak_bytes
    baseline = applied.plan.baseline_bytes
    budget = baseline + (plain.predicted_peak_bytes - baseline) * 6 // 10
    reference = 2 * plain.predicted_peak_bytes
    with tightfit.fit(model, BATCH, optimizer=optimizer, budget=budget, reference_budget_bytes=reference) as applied:
        verdict = applied.verdict
        assert verdict is not None
        assert verdict.ok
        assert verdict.method == "whole-step"
        assert verdict.replayed_ops > 0
        assert verdict.mismatches == 0
        assert verdict.measured_peak_bytes <= budget
        assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.to_local(), before[name])
        assert parameter.grad is None
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_blocks_that_are_checkpointed_around_what_is_sharded(mesh: DeviceMesh) -> None:
    """As accelerate wraps them: their weights are given back before the checkpointed function ends."""
    torch.manual_seed(0)
    model = Net()
    for place, block in enumerate(model.blocks):
        fully_shard(block, mesh=mesh)
        model.blocks[place] = checkpoint_wrapper(block, preserve_rng_state=True)
    fully_shard(model, mesh=mesh)
    profile = tightfit.measure(model, BATCH)
    budget = tightfit.frontier(profile, points=2)[0].predicted_peak_bytes
    with tightfit.fit(model, BATCH, budget=budget, profile=profile, reference_budget_bytes=2**30) as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert applied.verdict.replayed_ops > 0
        assert applied.verdict.measured_peak_bytes <= budget


def test_the_profile_is_of_the_model_and_says_that_it_is_sharded(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    assert is_sharded(model)
    assert not is_sharded(Net())
    assert process_group_of(model).world_size == 1
    assert process_group_of(Net()) is SINGLE_PROCESS
    profile = tightfit.measure(model, BATCH)
    assert profile.is_sharded
    assert profile.model == "Net"
    assert profile.fingerprint == fingerprint(model) == fingerprint(Net())


def test_no_plan_below_one_level(mesh: DeviceMesh) -> None:
    """It would replay through blocks whose weights are not there."""
    profile = tightfit.measure(sharded(mesh), BATCH)
    whole = tightfit.measure(Net(), BATCH)
    with pytest.raises(tightfit.BudgetInfeasible) as of_parts:
        tightfit.solve(profile, budget_bytes=1)
    with pytest.raises(tightfit.BudgetInfeasible) as of_whole:
        tightfit.solve(whole, budget_bytes=1)
    assert tightfit.solve(whole, budget_bytes=of_whole.value.required_bytes).shared_tapes
    assert not tightfit.solve(profile, budget_bytes=of_parts.value.required_bytes).shared_tapes


def test_other_shapes_are_planned_without_a_trial(mesh: DeviceMesh) -> None:
    model = sharded(mesh)
    peak = tightfit.measure(model, BATCH)
    budget = tightfit.solve(peak, budget_bytes=2**40).plain_peak_bytes
    with tightfit.fit(model, BATCH, budget=budget) as applied:
        other = torch.randn(96, 32)
        applied.prepare(other)
        statistics = applied.plans.statistics
        assert statistics.tried == 0
        applied.loss(model, other).backward()
        assert applied.active_plan is not None
        assert not applied.active_plan.is_plain


def test_what_is_not_known_is_refused(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    with pytest.raises(UnsupportedInput, match="along another dimension than the first"):
        tightfit.measure(model, torch.randn(2, 4), loss=lambda m, b: m(b).sum())
