"""Models of timm and torchvision, on small images of random numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.subject import Subject, mean_square

CLASSES, SIZE = 10, 64


def build(family: str, name: str) -> Subject:
    makers: dict[str, Callable[[str], Subject]] = {
        "timm": _timm,
        "torchvision-classification": _classifier,
        "torchvision-detection": _detector,
        "torchvision-segmentation": _segmenter,
        "torchvision-video": _video,
    }
    return makers[family](name)


def timm_model(name: str, classes: int = CLASSES) -> tuple[nn.Module, int]:
    """Return a model of timm for small images, if it can be made for them, and the images' size."""
    import timm

    with suppress(TypeError, AssertionError, RuntimeError, ValueError):
        return timm.create_model(name, num_classes=classes, img_size=SIZE), SIZE
    model = timm.create_model(name, num_classes=classes)
    return model, model.default_cfg["input_size"][-1] if model.default_cfg.get("fixed_input_size") else SIZE


def _timm(name: str) -> Subject:
    model, size = timm_model(name)
    return _labelled(model, size)


def _labelled(model: nn.Module, size: int) -> Subject:
    """Return a classifier with as many images as take a step of milliseconds."""
    count = 4 if size <= 2 * SIZE else 2
    return Subject.single(model, (torch.randn(count, 3, size, size), torch.arange(count) % CLASSES), _cross_entropy)


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    result = model(images)
    outputs = result if isinstance(result, tuple) else (result,)  # googlenet and inception have auxiliary heads
    return torch.stack([F.cross_entropy(one, labels) for one in outputs if isinstance(one, Tensor)]).sum()


def _classifier(name: str) -> Subject:
    from torchvision.models import get_model

    size = {"inception_v3": 96, "alexnet": 96}.get(name, 64)
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    if name == "maxvit_t":
        size = 224
    model = get_model(name, num_classes=CLASSES, **options)
    return _labelled(model, size)


def _detector(name: str) -> Subject:
    from torchvision.models import get_model

    options: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
    model = get_model(name, num_classes=5, weights=None, weights_backbone=None, **options)
    target: dict[str, Tensor] = {"boxes": torch.tensor([[4.0, 4.0, 60.0, 60.0], [20.0, 30.0, 80.0, 90.0]])}
    target["labels"] = torch.tensor([1, 2])
    if name.startswith("maskrcnn"):
        target["masks"] = torch.ones(2, 96, 96, dtype=torch.uint8)
    if name.startswith("keypointrcnn"):
        target["labels"] = torch.tensor([1, 1])
        target["keypoints"] = torch.full((2, 17, 3), 40.0)
    images = list(torch.rand(2, 3, 96, 96))
    return Subject.single(model, (images, [target, dict(target)]), _sum_of_losses)


def _sum_of_losses(model: nn.Module, batch: Any) -> Tensor:
    return torch.stack(list(model(*batch).values())).sum()


def _segmenter(name: str) -> Subject:
    from torchvision.models import get_model

    model = get_model(name, num_classes=5, weights=None, weights_backbone=None)
    return Subject.single(model, torch.randn(2, 3, 96, 96), _pixels)


def _pixels(model: nn.Module, images: Tensor) -> Tensor:
    labels = torch.zeros(len(images), *images.shape[-2:], dtype=torch.long)
    return torch.stack([F.cross_entropy(one, labels) for one in model(images).values()]).sum()


def _video(name: str) -> Subject:
    from torchvision.models import get_model

    shapes = {"s3d": (2, 3, 16, 64, 64), "mvit_v1_b": (1, 3, 16, 224, 224), "mvit_v2_s": (1, 3, 16, 224, 224)}
    model = get_model(name, num_classes=CLASSES)
    return Subject.single(model, torch.randn(*shapes.get(name, (2, 3, 8, 64, 64))), mean_square)
