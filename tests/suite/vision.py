"""Models of images."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.suite.case import Case, Size

_CLASSES = 10


def _images(count: int, side: int, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, side, side)


def _labels(count: int) -> Tensor:
    return torch.randint(0, _CLASSES, (count,))


def _class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def _transformers_case(model: nn.Module, count: int, side: int) -> Case:
    return Case(model=model, batch={"pixel_values": _images(count, side), "labels": _labels(count)})


def vit(size: Size) -> Case:
    """Vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    count, side, width, layers = (2, 16, 32, 2) if size == "tiny" else (16, 48, 128, 4)
    config = ViTConfig(
        image_size=side,
        patch_size=4,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.1,
        num_labels=_CLASSES,
    )
    return _transformers_case(ViTForImageClassification(config), count, side)


def swin(size: Size) -> Case:
    """Shifted windows, stochastic depth, relative position bias."""
    from transformers import SwinConfig, SwinForImageClassification

    count, side, width = (2, 16, 16) if size == "tiny" else (8, 64, 32)
    config = SwinConfig(
        image_size=side,
        patch_size=2,
        embed_dim=width,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=_CLASSES,
    )
    return _transformers_case(SwinForImageClassification(config), count, side)


def convnext(size: Size) -> Case:
    """Depthwise convolutions, layer norm on channels, layer scale."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    count, side, width, depth = (2, 16, 8, 1) if size == "tiny" else (8, 64, 32, 2)
    config = ConvNextConfig(
        image_size=side,
        patch_size=2,
        num_stages=3,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[depth, depth, depth],
        drop_path_rate=0.1,
        num_labels=_CLASSES,
    )
    return _transformers_case(ConvNextForImageClassification(config), count, side)


class Residual(nn.Module):
    """Two convolutions with batch norm and in-place ReLU, and a shortcut, as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet(size: Size) -> Case:
    """Batch norm and in-place ReLU."""
    count, side, width, blocks = (4, 16, 8, 1) if size == "tiny" else (16, 48, 24, 2)
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    ]
    inputs = width
    for stage in range(3):
        outputs = width << stage
        for block in range(blocks):
            layers.append(Residual(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, _CLASSES))
    return Case(model=model, batch=(_images(count, side), _labels(count)), loss=_class_loss)


class DoubleConv(nn.Sequential):
    """Convolution, group norm, SiLU, twice."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GroupNorm(4, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.GroupNorm(4, outputs),
            nn.SiLU(),
        )


class UNet(nn.Module):
    """Down, up, and connections across."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        widths = [width << level for level in range(depth)]
        self.stem = DoubleConv(3, width)
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise(widths))
        self.shrink = nn.MaxPool2d(2)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(list(pairwise(widths))))
        self.up = nn.ModuleList(DoubleConv(2 * a, a) for a in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = [self.stem(x)]
        for block in self.down:
            across.append(block(self.shrink(across[-1])))
        x = across.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([across.pop(), grow(x)], 1))
        return self.head(x)


def _segmentation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, masks = batch
    return F.binary_cross_entropy_with_logits(model(images), masks)


def unet(size: Size) -> Case:
    """Segmentation: activations that live across the whole network."""
    count, side, width, depth = (2, 16, 8, 3) if size == "tiny" else (4, 64, 16, 4)
    masks = (torch.rand(count, 1, side, side) > 0.5).float()
    return Case(model=UNet(width, depth), batch=(_images(count, side), masks), loss=_segmentation_loss)


class DenseBlock(nn.Module):
    """Each layer sees the concatenation of all before it."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + growth * layer),
                nn.ReLU(inplace=True),
                nn.Conv2d(inputs + growth * layer, 4 * growth, 1, bias=False),
                nn.BatchNorm2d(4 * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
                nn.Dropout(0.1),
            )
            for layer in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet(size: Size) -> Case:
    """Concatenations of everything before."""
    count, side, growth, layers = (2, 16, 4, 3) if size == "tiny" else (8, 32, 12, 6)
    blocks: list[nn.Module] = [nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)]
    width = 2 * growth
    for block in range(2):
        if block:
            blocks += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
        blocks.append(DenseBlock(width, growth, layers))
        width += growth * layers
    model = nn.Sequential(
        *blocks, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, _CLASSES)
    )
    return Case(model=model, batch=(_images(count, side), _labels(count)), loss=_class_loss)
