"""What would end the process or the CUDA context if it ran on made-up or missing data, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import tightfit

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


class Attention(nn.Module):
    """fp32 and dropout: memory-efficient attention, whose random seed is in host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(256, 768)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 64).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1).sum()


def measure_attention() -> None:
    torch.manual_seed(0)
    model, batch = Attention().to("cuda"), torch.randn(4, 128, 256, device="cuda")
    profile = tightfit.measure(model, batch, cost_cache=False)
    (backward,) = [s for s in profile.signatures if "efficient_attention_backward" in s.name]
    assert backward.ms > 0  # it was run, with its seed where the kernel looks for it
    torch.ones(4, device="cuda").sum().item()
    print(profile.method)


def test_efficient_attention_with_dropout_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import measure_attention; measure_attention()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "fake"
