"""Write files that load with `weights_only=True`, and change no name in them by a plan.

See https://github.com/nerfstudio-project/nerfstudio/issues/3683.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tightfit
from tests.promises.training import adamw, differences, train
from tightfit import Applied, Plan, UnsupportedInput
from tightfit.cli.main import main
from tightfit.installation.region_forward import RegionForward
from tightfit.train.checkpoint import read_training_state

BATCHES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Net(nn.Module):
    """With a buffer, tied weights and a parametrization: what naming goes wrong with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.middle = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.decoder = nn.Linear(16, 8)
        self.tied = nn.Linear(8, 16, bias=False)
        self.tied.weight = self.encoder[0].weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.decoder(torch.sigmoid(self.middle(self.encoder(x))))
        return (self.tied(y).sin() + 1).pow(2).mean()


@pytest.fixture
def planned() -> Iterator[tuple[nn.Module, torch.optim.Optimizer, Applied]]:
    """A model that has trained a step under a plan, which is still installed."""
    model = Net()
    optimizer = adamw(model)
    with tightfit.fit(model, BATCHES[0], optimizer=optimizer, grad_checkpoint="full") as applied:
        assert applied.installed
        train(model, BATCHES[:1], applied.loss, optimizer)
        yield model, optimizer, applied


def through_a_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_name_is_that_of_the_model_without_a_plan(planned: tuple[nn.Module, Any, Applied]) -> None:
    model, _, _ = planned
    plain = Net()
    assert list(model.state_dict()) == list(plain.state_dict())
    for listing in (nn.Module.named_parameters, nn.Module.named_buffers, nn.Module.named_modules):
        assert [name for name, _ in listing(model)] == [name for name, _ in listing(plain)]
    assert repr(model) == repr(plain)
    assert [type(a).__name__ for a in model.modules()] == [type(b).__name__ for b in plain.modules()]


def test_training_goes_on_from_files_with_and_without_a_plan(planned: tuple[nn.Module, Any, Applied]) -> None:
    model, optimizer, applied = planned
    weights, state = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    with_plan = train(model, BATCHES[1:], applied.loss, optimizer)
    plain = Net()
    plain_optimizer = adamw(plain)
    plain.load_state_dict(weights)
    plain_optimizer.load_state_dict(copy.deepcopy(state))  # which the optimizer takes over and writes into
    assert differences(train(plain, BATCHES[1:], lambda m, b: m(b), plain_optimizer), with_plan) == []
    # And back: weights from elsewhere go into the planned model, which goes on from them.
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert differences(train(model, BATCHES[1:], applied.loss, optimizer), with_plan) == []


def test_safetensors(planned: tuple[nn.Module, Any, Applied], tmp_path: Path) -> None:
    model, _, _ = planned
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert sorted(loaded) == sorted(Net().state_dict())
    assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())
    save_model(model, str(tmp_path / "model.safetensors"))  # which drops one name of each tied weight
    assert load_file(tmp_path / "model.safetensors").keys() < Net().state_dict().keys()


def test_the_whole_model_in_a_file_or_copied_has_no_plan() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8), nn.Sigmoid())
    with tightfit.fit(model, BATCHES[0], loss=lambda m, b: m(b).sum(), grad_checkpoint="full") as applied:
        assert applied.installed
        for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert not any(isinstance(vars(m).get("forward"), RegionForward) for m in copied.modules())
            assert list(copied.state_dict()) == list(model.state_dict())
            assert torch.equal(copied(BATCHES[1]), model(BATCHES[1]))
            nn.init.zeros_(copied[3].weight)  # its own weights, not the planned model's
            assert not torch.equal(copied(BATCHES[1]), model(BATCHES[1]))


def test_what_the_trainer_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "gpt-tiny", "--batch-size", "2", "--sequence-length", "16"]
    assert main(["train", *words, "--steps", "1", "--grad-checkpoint", "full"]) == 0
    run = tmp_path / "runs" / "python-source" / "gpt-tiny"
    (file,) = run.glob("checkpoints/step-*/training.safetensors")
    checkpoint = read_training_state(file.parent)
    assert not Plan.load(run / "plan.json").is_plain, "nothing was recomputed"
    exported = load_file(run / "model.safetensors")
    assert all(torch.equal(exported[name], checkpoint["model"][name]) for name in exported)
    for name in checkpoint["model"]:
        assert not name.startswith(("_orig_mod.", "module."))
        assert "forward" not in name


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_compiled_model_is_refused_so_that_its_names_cannot_mix() -> None:
    """`torch.compile` renames (`_orig_mod.`); a plan is made for the model as it was before."""
    compiled = torch.compile(Net())
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    with pytest.raises(UnsupportedInput, match=r"as it was before torch\.compile"):
        tightfit.fit(compiled, BATCHES[0])


@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel_around_a_planned_model() -> None:
    """DDP puts `module.` before names, plan or not; beneath it they are the model's own, and training is plain's."""
    results = []
    for with_plan in (False, True):
        model = Net()
        if with_plan:
            tightfit.fit(model, BATCHES[0], grad_checkpoint="full")
        wrapped = DistributedDataParallel(model)
        assert list(wrapped.state_dict()) == [f"module.{name}" for name in Net().state_dict()]
        assert list(wrapped.module.state_dict()) == list(Net().state_dict())
        results.append(train(wrapped, BATCHES, lambda m, b: m(b), adamw(model)))
    assert differences(*results) == []
