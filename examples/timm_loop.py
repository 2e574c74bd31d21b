"""A loop in the manner of timm, as it is and inside a budget: mixup, drop path, channels last, AMP, a moving average.

python examples/timm_loop.py [--budget 12MiB]     needs: pip install timm
"""

from __future__ import annotations

import timm
import torch
from comparison import beside, compare
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import tightfit

IMAGES, LABELS = torch.randn(4, 8, 3, 64, 64), torch.randint(0, 10, (4, 8))
CRITERION = SoftTargetCrossEntropy()


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the loss, under autocast."""
    images, targets = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return CRITERION(model(images), targets)


def train(budget: str | None) -> torch.nn.Module:
    """Three epochs with evaluation after each; the only difference is how the loss is called."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=64, depth=6, num_heads=4, num_classes=10,
        drop_path_rate=0.2,
    )  # fmt: skip
    model = model.to(memory_format=torch.channels_last)
    average = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
    loss = loss_of
    if budget is not None:
        held = beside(budget, sum(tensor.nbytes for tensor in average.module.state_dict().values()))
        batch = IMAGES[0].to(memory_format=torch.channels_last), torch.full((8, 10), 0.1)
        loss = tightfit.fit(model, batch, budget=held, loss=loss_of, optimizer=optimizer).loss
    for _ in range(3):
        model.train()
        for images, labels in zip(IMAGES, LABELS, strict=True):
            mixed, targets = mixup(images.clone(), labels)
            loss(model, (mixed.to(memory_format=torch.channels_last), targets)).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        with torch.no_grad():
            average.module(IMAGES[0])
    return model


if __name__ == "__main__":
    compare(train, budget="12MiB")
