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


class Caching(Net):
    """Its blocks write what they make into an object that the model hands to each, as a cache of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Remembering() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        cache = _Cache()
        for number, block in enumerate(self.blocks):
            x = block(x, cache=cache, number=number)
        return x.square().mean()


class _Cache:
    def __init__(self) -> None:
        self.kept: dict[int, list[Tensor]] = {}


class _Remembering(Block):
    def forward(self, x: Tensor, cache: _Cache, number: int) -> Tensor:  # type: ignore[override]  # as attention does
        cache.kept.setdefault(number, []).append(self.norm(x))
        return x + self.down(nn.functional.gelu(self.up(torch.stack(cache.kept[number]).sum(0))))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_what_a_call_has_written_into_its_arguments_is_not_there_when_it_is_made_again(
    is_sharded: bool, mesh: DeviceMesh
) -> None:
    """As in transformers' Llama: with what the first call had left, a second one went through its graph."""
    model = Caching()
    if is_sharded:
        each_block(model, mesh)
    with fitted(model) as applied:
        verdict = applied.verdict
    assert verdict is not None
    assert (verdict.method, verdict.ok, verdict.compared_share) == ("per-region", True, 1.0)


class Together(Net):
    """Its blocks have a backward inside the model's forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_NotAlone(self) for _ in range(4)))
        self.runs = False

    def forward(self, x: Tensor) -> Tensor:
        self.runs = True
        try:
            return super().forward(x)
        finally:
            self.runs = False


class _NotAlone(Block):
    def __init__(self, model: Together) -> None:
        super().__init__()
        self.of = [model]

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not self.of[0].runs:
            out.register_hook(_fails)
        return out


def _fails(gradient: Tensor) -> Tensor:
    raise RuntimeError("the block was called alone")


def test_a_backward_that_fails_when_a_region_is_called_alone_leaves_the_model_as_it_was(mesh: DeviceMesh) -> None:
    """FSDP2 waited for its end, and reduced no later one."""
    model = Together()
    each_block(model, mesh)
    plain = gradients(model, lambda: model(BATCH))
    with pytest.warns(tightfit.errors.ProofWarning), fitted(model) as applied:
        planned = gradients(model, lambda: applied.loss(model, BATCH))
    assert all(torch.equal(one, two) for one, two in zip(plain, planned, strict=True))


def test_gradients_that_wait_to_be_reduced_are_the_loops_own(mesh: DeviceMesh) -> None:
    """`fit` is called between two backwards of a step, of which the first does not reduce."""

    def step(between: Callable[[nn.Module], Any]) -> list[Tensor]:
        model = Net()
        each_block(model, mesh)
        model.set_requires_gradient_sync(False)  # type: ignore[operator]  # of FSDP2
        torch.manual_seed(1)
        model(BATCH).backward()
        between(model)
        model.set_requires_gradient_sync(True)  # type: ignore[operator]  # of FSDP2
        return gradients(model, lambda: model(BATCH))

    plain, planned = step(lambda model: None), step(lambda model: fitted(model).remove())
    assert all(torch.equal(one, two) for one, two in zip(plain, planned, strict=True))
