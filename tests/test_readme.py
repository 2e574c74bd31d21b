"""The README's Python example runs as it is printed, and its training runs begin as they are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from tightfit.cli.main import main

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    before = model[0].weight.detach().clone()
    batches = [torch.randn(16, 8) for _ in range(3)]
    names = {
        "model": model,
        "batch": batches[0],
        "batches": batches,
        "loss_fn": lambda m, b: m(b).pow(2).mean(),
        "optimizer": torch.optim.AdamW(model.parameters()),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert not torch.equal(before, model[0].weight)


def test_the_training_runs_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their first two steps, within their budgets; what they reach takes too long for a test."""
    monkeypatch.chdir(README.parent)
    _, _, section = README.read_text(encoding="utf-8").partition("### Training\n")
    blocks = re.findall(r"```\ntightfit (train .*?)```", section.partition("\n### ")[0], re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        words = shlex.split(re.sub(r"--epochs \d+", "--steps 2", block.replace("\\\n", " ")))
        assert main([*words, "--eval-samples", "8", "--root-path", str(tmp_path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["measured_peak_bytes"] <= found["budget_bytes"] < 0.6 * found["plain_peak_bytes"]
        assert found["gradients_equal"] is True
