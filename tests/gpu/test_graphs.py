"""CUDA graphs: a plan cannot be captured, and says so; without it the model can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tightfit
from tightfit.solver.solver import full_plan, plain_plan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


def captured(model: nn.Module, batch: torch.Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(batch).sum().backward()
    return graph


def test_a_plan_that_recomputes_is_not_captured() -> None:
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)]
    model = nn.Sequential(*blocks).to("cuda")
    batch = torch.randn(8, 32, device="cuda")
    profile = tightfit.measure(model, batch, loss=lambda model, batch: model(batch).sum())
    with tightfit.apply(model, full_plan(profile, 2**50)) as applied:
        model(batch).sum().backward()
        with pytest.raises(tightfit.UnsupportedInput, match="captured into a CUDA graph"):
            captured(model, batch)
        applied.statistics.reset()
        model(batch).sum().backward()
        assert applied.statistics.replayed_ops > 0
        with applied.paused():
            captured(model, batch).replay()
    with tightfit.apply(model, plain_plan(profile, 2**50)):
        captured(model, batch).replay()
