"""A loop with Accelerate, as it is and inside a budget: mixed precision, accumulation, clipping, evaluation.

python examples/accelerate_loop.py [--budget 4900KiB]     needs: pip install accelerate
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from comparison import compare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tightfit

DATA = TensorDataset(torch.randn(1024, 64), torch.randn(1024, 64))


def network() -> nn.Module:
    """Return the network."""
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64)) for _ in range(6)]
    return nn.Sequential(*blocks)


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the loss."""
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def train(budget: str | None) -> nn.Module:
    """Three epochs; the only difference is how the loss is called."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, loader, held_out = accelerator.prepare(
        model, optimizer, DataLoader(DATA, batch_size=256, shuffle=True), DataLoader(DATA, batch_size=256)
    )
    loss = loss_of
    if budget is not None:  # after `prepare`, so on the model as it trains
        loss = tightfit.fit(
            model, DATA[:256], budget=budget, loss=loss_of, optimizer=optimizer.optimizer,
            accumulation_steps=2, clip_norm=1.0,
        ).loss  # fmt: skip
    for _ in range(3):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            sum(float(loss_of(model, batch)) for batch in held_out)
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    compare(train, budget="4900KiB")
