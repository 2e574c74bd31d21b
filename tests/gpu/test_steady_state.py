"""What every step of a training pays on a GPU: no waiting for the device, and no memory asked of the driver again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit.cli.main import main
from tightfit.solver.solver import full_plan
from tightfit.step.step import Step

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


class FrozenStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(4)
        )
        self.head = nn.Linear(16, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    yield
    torch.backends.cudnn.enabled = before


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.usefixtures("without_cudnn")
def test_a_planned_step_with_frozen_batch_norm_never_waits_for_the_device() -> None:
    torch.manual_seed(0)
    model, batch = FrozenStatistics().to("cuda"), torch.randn(8, 16, 32, 32, device="cuda")
    step = Step(loss=lambda model, batch: model(batch).pow(2).mean())
    profile = tightfit.measure(model, batch, step=step)
    with tightfit.apply(model, full_plan(profile, 2**50), step=step) as applied:
        for _ in range(2):  # the first one checks itself
            applied.loss(model, batch).backward()
        replayed = applied.statistics.replayed_ops
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            applied.loss(model, batch).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert applied.statistics.replayed_ops > replayed


def test_gradients_are_clipped_in_measuring_by_the_operations_of_a_real_step() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]).to("cuda")
    batch = torch.randn(8, 64, device="cuda")
    profile = tightfit.measure(model, batch, loss=lambda model, batch: model(batch).sum(), clip_norm=1.0)
    names = {signature.name for signature in profile.signatures}
    assert {"aten._foreach_norm.Scalar", "aten._foreach_mul_.Tensor"} <= names
    assert profile.method == "fake"


def test_training_starts_and_logging_a_step_empties_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emptied: list[Any] = []
    monkeypatch.chdir(tmp_path)
    empty_cache = torch.cuda.empty_cache
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (emptied.append(1), empty_cache()))
    counts = []
    for steps in ("1", "2", "6"):  # the first measures twice, as it learns which fake kernels say other strides
        emptied.clear()
        arguments = ["train", "--model", "gpt-tiny", "--dataset", "python-source", "--steps", steps, "--log-every", "1"]
        assert main([*arguments, "--device", "auto", "--mark", f"steps-{steps}"]) == 0
        counts.append(len(emptied))
    assert counts[1] == counts[2] > 0
    assert "cuda:0" in capsys.readouterr().out
