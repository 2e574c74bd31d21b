"""A snapshot puts back what a step changes, and nothing that others installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from tightfit.replay.installed import Installed
from tightfit.step import snapshot
from tightfit.step.snapshot import TrainingState

Tensor = torch.Tensor


def test_an_installed_plan_is_not_the_steps_doing() -> None:
    """`restore` neither takes a plan's forward away nor brings one back."""
    model = nn.Sequential(nn.Linear(4, 4))
    state = TrainingState(model, ())
    forward = Installed(recipes={})
    model.__dict__["forward"] = forward
    model.mark = 1  # type: ignore[assignment]  # set by hand
    state.restore()
    assert model.__dict__["forward"] is forward
    assert "mark" not in vars(model)


def test_a_sparse_gradient_is_put_back() -> None:
    embedding = nn.Embedding(6, 3, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    before = gradient.to_dense()
    state = TrainingState(embedding, ())
    embedding(torch.tensor([2, 4])).sum().backward()
    assert not torch.equal(gradient.to_dense(), before)
    state.restore()
    assert embedding.weight.grad is gradient
    assert torch.equal(gradient.to_dense(), before)
    assert gradient._nnz() == 2


def test_tensors_without_data_are_left_alone() -> None:
    """A skeleton on ``meta``, as `torch.func.functional_call` is given for a stack of models."""
    model = nn.Linear(4, 4)
    model.skeleton = [nn.Linear(4, 4, device="meta")]  # type: ignore[assignment]  # a list hides it from `parameters`
    state = TrainingState(model, ())
    with torch.no_grad():
        model.weight.zero_()
        model.skeleton[0].weight.zero_()  # type: ignore[index]  # as above
    state.restore()
    assert model.weight.count_nonzero()


def test_what_an_earlier_snapshot_has_is_not_copied_again(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor shards that FSDP2 shows through new tensors since its first step."""
    model = fully_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mesh=mesh)
    given = TrainingState(model, ())
    model(torch.ones(2, 4)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    given.restore_contents()
    copied: list[Tensor] = []
    monkeypatch.setattr(
        snapshot, "HostCopy", lambda tensor, file, make=snapshot.HostCopy: copied.append(tensor) or make(tensor, file)
    )
    TrainingState(model, (), known=given)
    assert not [one for one in copied if one.numel() >= 4]
    model[0].register_buffer("new", torch.ones(2, 3))
    TrainingState(model, (), known=given)
    assert [one.shape for one in copied if one.numel() >= 4] == [(2, 3)]
