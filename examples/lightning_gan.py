"""A GAN that Lightning trains by manual optimization, as it is and inside a budget: memory, time, bits.

python examples/lightning_gan.py [--budget 8MiB]     needs: pip install lightning
"""

from __future__ import annotations

import logging

import lightning.pytorch as lightning
import torch
from comparison import compare
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from tightfit.integrations.lightning import TightfitCallback

DATA = TensorDataset(torch.randn(1024, 64))


class Gan(lightning.LightningModule):
    """Any module: nothing in it knows of tightfit."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = network(64), network(1)

    def training_step(self, batch: list[torch.Tensor], number: int) -> None:
        """Train the critic, and then the generator."""
        real, noise = batch[0], torch.randn_like(batch[0])
        generator, critic = self.optimizers()
        self.toggle_optimizer(critic)
        loss = softplus(-self.critic(real)).mean() + softplus(self.critic(self.generator(noise).detach())).mean()
        self.manual_backward(loss)
        critic.step()
        critic.zero_grad()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        self.manual_backward(softplus(-self.critic(self.generator(noise))).mean())
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)

    def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
        """Note what the critic makes of the generator."""
        self.log("held out", self.critic(self.generator(batch[0])).mean())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return an optimizer for each half."""
        return [torch.optim.Adam(part.parameters(), betas=(0.5, 0.9)) for part in (self.generator, self.critic)]


def network(outputs: int) -> nn.Module:
    """Return half of the GAN."""
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(64, outputs))


def train(budget: str | None) -> nn.Module:
    """Three epochs with evaluation after each; the only difference is one callback."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Gan()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[] if budget is None else [TightfitCallback(budget=budget)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, batch_size=256, shuffle=True), DataLoader(DATA, batch_size=256))
    return module


if __name__ == "__main__":
    compare(train, budget="8MiB")
