"""What there is in the zoo: for each family, how a name becomes a model and a batch."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from benchmarks.zoo.subject import Subject

#: The module whose `build` makes a family's subjects.
_MODULES = {
    "timm": "vision",
    "torchvision-classification": "vision",
    "torchvision-detection": "vision",
    "torchvision-segmentation": "vision",
    "torchvision-video": "vision",
    "transformers-causal": "language",
    "transformers-masked": "language",
    "transformers-seq2seq": "language",
    "transformers-moe": "language",
    "transformers-state-space": "language",
    "transformers-vision": "language",
    "transformers-audio": "language",
    "diffusers": "diffusion",
    "torch-geometric": "graphs",
    "monai": "medical",
    "adapters": "adapters",
    "two-networks": "steps",
    "double-backward": "steps",
}


def families() -> tuple[str, ...]:
    return tuple(_MODULES)


def build(family: str, name: str) -> Subject:
    """Make a subject; its library is imported only now."""
    module = importlib.import_module(f"{__name__}.{_MODULES[family]}")
    builder: Callable[[str, str], Subject] = module.build
    return builder(family, name)
