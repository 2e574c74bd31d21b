"""Accelerate: `fit` before or after `prepare`, under mixed precision, with accumulation and clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")

import tightfit  # noqa: E402  # below the skip

pytestmark = [pytest.mark.filterwarnings("ignore")]

BATCHES = [torch.randn(64, 16, generator=torch.Generator().manual_seed(number)) for number in range(4)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch), batch)


def trained(fit: str, precision: str) -> tuple[list[torch.Tensor], Any]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16)) for _ in range(3))
    )
    optimizer: Any = torch.optim.AdamW(model.parameters())
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    applied, loss = None, loss_of
    options: dict[str, Any] = {"accumulation_steps": 2, "clip_norm": 1.0, "grad_checkpoint": "full", "loss": loss_of}
    if fit == "before":
        applied = tightfit.fit(model, BATCHES[0], optimizer=optimizer, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    if fit == "after":
        applied = tightfit.fit(model, BATCHES[0], optimizer=optimizer.optimizer, **options)
    if applied is not None:
        loss = applied.loss  # type: ignore[assignment]  # its arguments have other names
    for batch in BATCHES:
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return [*model.parameters(), torch.rand(1)], applied


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_same_bits_whenever_fit_is_called(when: str, precision: str) -> None:
    plain, _ = trained("", precision)
    planned, applied = trained(when, precision)
    assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
    assert applied.statistics.replayed_ops + applied.statistics.recomputed_calls > 0
