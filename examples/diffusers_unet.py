"""A small UNet2DModel of diffusers that learns to denoise, as it is and inside a budget: memory, time, bits.

python examples/diffusers_unet.py [--budget 6MiB]     needs: pip install diffusers
"""

from __future__ import annotations

import torch
from comparison import beside, compare
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional

import tightfit

DATA = torch.randn(4, 4, 3, 16, 16)


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return how far the predicted noise is from the true one."""
    noisy, times, noise = batch
    return functional.mse_loss(model(noisy, times).sample, noise)


def train(budget: str | None) -> torch.nn.Module:
    """Three epochs with evaluation after each; the only difference is how the loss is called."""
    model = UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, dropout=0.1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    average = EMAModel(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = DDPMScheduler(num_train_timesteps=100)
    loss = loss_of
    if budget is not None:
        held = beside(budget, sum(parameter.nbytes for parameter in average.shadow_params))
        batch = DATA[0], torch.zeros(4, dtype=torch.int64), DATA[0]
        loss = tightfit.fit(model, batch, budget=held, loss=loss_of, optimizer=optimizer).loss
    for _ in range(3):
        model.train()
        for images in DATA:
            noise, times = torch.randn_like(images), torch.randint(0, 100, (len(images),))
            loss(model, (schedule.add_noise(images, noise, times), times, noise)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(model.parameters())
        model.eval()
        with torch.no_grad():
            loss_of(model, (DATA[0], torch.zeros(4, dtype=torch.int64), DATA[0]))
    return model


if __name__ == "__main__":
    compare(train, budget="6MiB")
