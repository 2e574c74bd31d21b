"""A fake run that fails leaves nothing behind, also where somebody keeps log records."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

import tightfit


class ThroughNumPy(nn.Module):
    """Its forward cannot run without data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = float(np.asarray(x.detach()).sum() > 1e9)
        return (self.layer(x) + shift).sum()


def test_a_record_that_is_kept_keeps_no_tensor_without_data(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tightfit")
    profile = tightfit.measure(ThroughNumPy(), torch.randn(2, 4))
    assert profile.method == "real"
    assert any("the fake run failed" in record.message for record in caplog.records)
