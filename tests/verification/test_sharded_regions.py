"""Where the plain step of a model that `fully_shard` has sharded does not fit, its regions are compared all the same.

In a group of one process; several ones are in tests/train/parallel/test_fsdp.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import tightfit
from tightfit.errors import VerificationFailed
from tightfit.replay.tape import Tape

BATCH = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = (
            nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32), nn.Dropout(0.1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(nn.functional.gelu(self.up(self.norm(x))))
        return x + self.down(hidden)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out.square().mean()


def each_block(model: Net, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def all_blocks(model: Net, mesh: DeviceMesh) -> None:
    """Regions lie inside a unit, whose weights somebody has to gather."""
    fully_shard(model.blocks, mesh=mesh)
    fully_shard(model, mesh=mesh)


def pairs_of_blocks(model: Net, mesh: DeviceMesh) -> None:
    """FSDP2 frees their weights after the last of the pair: half a pair cannot be called alone."""
    fully_shard([model.blocks[0], model.blocks[1]], mesh=mesh)
    fully_shard([model.blocks[2], model.blocks[3]], mesh=mesh)
    fully_shard(model, mesh=mesh)


def fitted(model: nn.Module) -> tightfit.Applied:
    plain_bytes = tightfit.solve(tightfit.measure(model, BATCH), 2**40).plain_peak_bytes
    return tightfit.fit(model, BATCH, budget=plain_bytes - 1, grad_checkpoint="full")


def gradients(model: nn.Module, step: Callable[[], Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    step().backward()
    found = [parameter.grad.to_local().clone() for parameter in model.parameters()]  # type: ignore[union-attr]  # DTensors
    model.zero_grad()
    return found


pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")


@pytest.mark.parametrize("shard", [each_block, all_blocks, pairs_of_blocks])
def test_regions_are_compared_on_gathered_weights(shard: Any, mesh: DeviceMesh) -> None:
    model = Net()
    shard(model, mesh)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    plain = gradients(model, lambda: model(BATCH))
    with fitted(model) as applied:
        verdict = applied.verdict
        planned = gradients(model, lambda: applied.loss(model, BATCH))
    assert verdict is not None
    assert verdict.method == "per-region"
    if shard is pairs_of_blocks:
        assert (verdict.ok, verdict.compared_share) == (None, 0.0)
    else:
        assert (verdict.ok, verdict.gradients_equal, verdict.compared_share) == (True, True, 1.0)
    assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    again = gradients(model, lambda: model(BATCH))
    for one, two, three in zip(plain, planned, again, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("shard", [each_block, all_blocks])
def test_a_corrupted_engine_fails(shard: Any, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tape.read

    def wrong(self: Tape, handle: Any) -> Tensor:
        tensor = right(self, handle)
        return tensor * (1 + 2**-20) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tape, "read", wrong)
    model = Net()
    shard(model, mesh)
    with pytest.raises(VerificationFailed, match=r"blocks\.0#0: gradient of ") as caught:
        fitted(model)
    assert caught.value.verdict.method == "per-region"
    assert not any("forward" in vars(module) for module in model.modules())
