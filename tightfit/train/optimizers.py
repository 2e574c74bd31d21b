"""PyTorch's optimizers by name, with weight decay where people expect it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from tightfit.errors import UnsupportedInput

OptimizerName = Literal["adamw", "adam", "sgd", "adafactor", "adagrad", "rmsprop"]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)


def make_optimizer(
    name: OptimizerName, model: nn.Module, *, lr: float, weight_decay: float, momentum: float, beta2: float
) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters of ``model`` that train.

    Weight decay is for matrices and higher: a bias or a norm's scale has one dimension and is not decayed, as in the
    usual recipes for transformers.

    Raises:
        UnsupportedInput: the model has no parameter to train.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UnsupportedInput(
            f"{type(model).__name__} has no trainable parameter, so there is nothing to train. "
            f"Set requires_grad on the parameters that training should change."
        )
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0))
        if parameters
    ]
    arguments: Mapping[str, Mapping[str, Any]] = {
        "adamw": {"betas": (0.9, beta2)},
        "adam": {"betas": (0.9, beta2)},
        "sgd": {"momentum": momentum},
    }
    kinds: Mapping[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "adafactor": torch.optim.Adafactor,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    made: torch.optim.Optimizer = kinds[name](groups, lr=lr, **arguments.get(name, {}))
    return made


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
