"""A network trained by Lightning's `Trainer`, as it is and inside a budget: memory, time, bits.

python examples/lightning_module.py [--budget 24MiB]     needs: pip install lightning
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tightfit.integrations.lightning import TightfitCallback


class Module(lightning.LightningModule):
    """Any module: nothing in it knows of tightfit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(block(128) for _ in range(8)))

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        """Return the loss."""
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters())


def block(width: int) -> nn.Module:
    """Return a layer of the network."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))


def train(budget: str | None) -> tuple[Module, float]:
    """Two epochs; the only difference is one callback."""
    lightning.seed_everything(0, verbose=False)
    module, data = Module(), TensorDataset(torch.randn(4096, 128), torch.randn(4096, 128))
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[] if budget is None else [TightfitCallback(budget=budget)],
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.fit(module, DataLoader(data, batch_size=512, shuffle=True))
    return module, time.perf_counter() - begin


def main() -> None:
    """Train twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="24MiB")
    budget = parser.parse_args().budget
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tightfit").setLevel(logging.INFO)  # says what a step takes
    (plain, plain_s), (planned, planned_s) = train(None), train(budget)
    weights = zip(plain.parameters(), planned.parameters(), strict=True)
    print(f"plain {plain_s:.1f} s, tightfit inside {budget} {planned_s:.1f} s, planning included")
    print(f"weights {'equal, bit for bit' if all(torch.equal(a, b) for a, b in weights) else 'DIFFER'}")


if __name__ == "__main__":
    main()
