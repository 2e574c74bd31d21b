"""A network trained by Lightning, as it is and inside a budget: memory, time, bits.

python examples/lightning_module.py [--budget 12MiB]     needs: pip install lightning
"""

from __future__ import annotations

import logging

import lightning.pytorch as lightning
import torch
from comparison import compare
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tightfit.integrations.lightning import TightfitCallback

DATA = TensorDataset(torch.randn(1024, 64), torch.randn(1024, 64))


class Module(lightning.LightningModule):
    """Any module: nothing in it knows of tightfit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(block(64) for _ in range(8)))

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        """Return the loss."""
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
        """Note the loss of the moving average."""
        self.log("held out", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters())


def block(width: int) -> nn.Module:
    """Return a layer of the network."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))


def train(budget: str | None) -> nn.Module:
    """Three epochs with a moving average and evaluation; the only difference is one callback."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0,
        callbacks=[EMAWeightAveraging(), *([] if budget is None else [TightfitCallback(budget=budget)])],
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, batch_size=256, shuffle=True), DataLoader(DATA, batch_size=256))
    return module


if __name__ == "__main__":
    compare(train, budget="9MiB")
