"""The README's Python example runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

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
