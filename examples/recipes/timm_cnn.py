"""A CNN of timm for `tightfit train`, which brings the data, the loss and the loop.

tightfit train --config-file examples/recipes/timm-cnn.yaml
"""

from __future__ import annotations

import timm
from torch import nn


def model(name: str = "mobilenetv3_small_050", classes: int = 10, channels: int = 1) -> nn.Module:
    """Make a model of timm by its name, with new weights; nothing is downloaded."""
    built: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    return built
