"""A residual network for small images (He et al. 2015, the CIFAR form): basic blocks, BatchNorm, in-place ReLU."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ResnetConfig:
    """Sizes of a `Resnet`."""

    channels: int = 3
    """Channels of the image."""
    classes: int = 10
    """Number of classes."""
    width: int = 16
    """Channels of the first stage; each of the two that follow doubles them and halves the image."""
    blocks: int = 3
    """Blocks in each of the three stages (3 makes ResNet-20)."""


class Resnet(nn.Module):
    """Class logits of an image."""

    def __init__(self, config: ResnetConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(config.channels, config.width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(config.width),
            nn.ReLU(inplace=True),
        )
        widths = [config.width, 2 * config.width, 4 * config.width]
        stages: list[nn.Module] = []
        previous = config.width
        for stage, width in enumerate(widths):
            for block in range(config.blocks):
                stages.append(BasicBlock(previous, width, stride=2 if stage > 0 and block == 0 else 1))
                previous = width
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(previous, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) for images (batch, channels, height, width)."""
        features = self.pool(self.blocks(self.stem(images)))
        logits: Tensor = self.head(features.flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two convolutions, added to a shortcut."""

    def __init__(self, in_width: int, out_width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != out_width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, out_width, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_width),
            )

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, in_width, height, width) to (batch, out_width, height / stride, width / stride)."""
        residual = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(images)))))
        residual += self.shortcut(images)
        result: Tensor = self.relu(residual)
        return result
