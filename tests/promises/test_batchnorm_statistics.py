"""Update BatchNorm's running statistics once a step, whatever is recomputed.

See https://github.com/pytorch/pytorch/issues/96136.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.promises.training import adamw, same_training

BATCHES = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]


class Block(nn.Module):
    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu_(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, checkpointed: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block(8, norm(8, **options)) for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x.pow(2).mean()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
def test_running_statistics_are_those_of_plain_training(options: dict[str, Any]) -> None:
    trained = same_training(lambda: ConvNet(**options), BATCHES)
    assert any("batch_norm" in r.op_names[p] for r in trained.plan.recipes for p in r.replay), "none was recomputed"
    counts = [b.item() for name, b in trained.planned.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == ([] if "track_running_stats" in options else [len(BATCHES)] * 3)
    statistics = dict(trained.plain.named_buffers())
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in trained.planned.named_buffers())


def test_the_bug_is_real_checkpointing_updates_twice() -> None:
    models = [ConvNet(), ConvNet(checkpointed=True)]
    for model in models:
        model(BATCHES[0]).backward()
    plain, checkpointed = (model.blocks[0].norm for model in models)
    assert (plain.num_batches_tracked, checkpointed.num_batches_tracked) == (1, 2)
    assert not torch.equal(plain.running_mean, checkpointed.running_mean)


# ------------------------------------------------------------------------------------------------ SyncBatchNorm
# PyTorch's SyncBatchNorm has kernels for CUDA only. On a CPU it is a plain BatchNorm without a process group and raises
# ValueError with one. What can be shown on a CPU is: the first equals plain, the second raises as plain, and a norm
# that reduces its moments over the group, written here, updates its statistics once and communicates once.


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sync_batchnorm_without_a_process_group() -> None:
    trained = same_training(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(ConvNet()), BATCHES)
    assert isinstance(trained.planned.blocks[0].norm, nn.SyncBatchNorm)
    assert trained.planned.blocks[0].norm.num_batches_tracked == len(BATCHES)


@pytest.mark.usefixtures("one_process_group")
def test_sync_batchnorm_with_a_process_group_on_a_cpu_is_refused_as_plain_refuses_it() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(ConvNet())
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU") as plain:
        ConvNet(norm=nn.SyncBatchNorm)(BATCHES[0])
    with pytest.raises(ValueError) as planned:
        tightfit.fit(model, BATCHES[0], optimizer=adamw(model), grad_checkpoint="full")
    assert str(planned.value) == str(plain.value)
    assert model.blocks[0].norm.num_batches_tracked == 0, "what failed has left the model as it was"
    assert not any("forward" in vars(module) for module in model.modules())


class Reduced(torch.autograd.Function):
    """The sum over all processes; its gradient is summed, too."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, moments: Tensor) -> Tensor:
        Reduced.calls += 1
        result = moments.clone()
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result = gradient.clone()
        dist.all_reduce(result)
        return result


class GroupNormalised(nn.BatchNorm2d):
    """What SyncBatchNorm computes, by operations that a CPU has."""

    def forward(self, x: Tensor) -> Tensor:
        moments = torch.cat([x.mean(dim=(0, 2, 3)), x.pow(2).mean(dim=(0, 2, 3))])
        mean, square = (Reduced.apply(moments) / dist.get_world_size()).chunk(2)
        variance = square - mean * mean
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        scaled = (x - mean[:, None, None]) * torch.rsqrt(variance + self.eps)[:, None, None]
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.usefixtures("one_process_group")
def test_a_norm_over_a_process_group_updates_and_communicates_once() -> None:
    trained = same_training(lambda: ConvNet(norm=GroupNormalised), BATCHES)
    assert trained.planned.blocks[0].norm.num_batches_tracked == len(BATCHES)
    collectives = {
        recipe.op_names[position]
        for recipe in trained.plan.recipes
        for position in recipe.replay
        if recipe.op_names[position].startswith("c10d")
    }
    assert collectives == set(), "a collective that is replayed waits for the other processes"
    model = ConvNet(norm=GroupNormalised)
    with tightfit.fit(model, BATCHES[0], grad_checkpoint="full") as applied:
        Reduced.calls = 0
        applied.statistics.reset()
        applied.loss(model, BATCHES[0]).backward()
        assert applied.statistics.replayed_ops > 0
        assert Reduced.calls == 3, "once for each block"
