"""Check what a step needs of its model: parameters to train, on one device, with gradients that are resident."""

from __future__ import annotations

from typing import Any

import torch

from tightfit._torch_private import is_compiled
from tightfit.errors import UnsupportedInput


def check_model(model: Any) -> None:
    """Raise `UnsupportedInput` for a model that tightfit cannot plan."""
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedInput(
            f"the model is a {type(model).__name__}, not a torch.nn.Module. Regions are calls of modules. "
            "Wrap the computation in an nn.Module."
        )
    if isinstance(model, torch.nn.DataParallel):
        raise UnsupportedInput(
            "the model is an nn.DataParallel, which copies it into several threads at every step. A plan is for one "
            "forward at a time. Use one process per device (torchrun) instead."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedInput(
            f"{type(model).__name__} has no parameter that requires a gradient. There is nothing to train. "
            "Unfreeze parameters with requires_grad_(True)."
        )
    if is_compiled(model):
        raise UnsupportedInput(
            "the model is compiled as a whole with torch.compile, where operations do not pass through PyTorch's "
            "dispatcher and cannot be planned yet. Give tightfit the model as it was before torch.compile, or compile "
            "its blocks one by one (block.compile())."
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedInput(
            f"the model's parameters are on several devices ({', '.join(sorted(map(str, devices)))}). A budget is for "
            "one device. Move the model to one device."
        )


def give_gradients(model: torch.nn.Module) -> None:
    """Make zero gradients where there are none: they are resident from the start, as in every step but the first.

    Those of embeddings that ask for sparse ones are sparse, and empty.
    """
    sparse = {id(module.weight) for module in model.modules() if getattr(module, "sparse", False) is True}
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter.grad is not None:
            continue
        if id(parameter) in sparse:
            parameter.grad = torch.sparse_coo_tensor(
                torch.empty(1, 0, dtype=torch.long, device=parameter.device),
                parameter.new_empty(0, *parameter.shape[1:]),
                parameter.shape,
                check_invariants=False,
            )
        else:
            parameter.grad = torch.zeros_like(parameter)


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device of the model's parameters."""
    return next(model.parameters()).device
