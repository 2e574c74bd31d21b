"""Check what a step needs of its model: parameters to train, on one device, with gradients that are resident."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tightfit._torch_private.modules import is_compiled
from tightfit.distributed.fsdp import is_sharded
from tightfit.errors import UnsupportedInput
from tightfit.step.models import name_of, paths_of_models


def check_model(model: Any) -> None:
    """Raise `UnsupportedInput` for a model that tightfit cannot plan."""
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedInput(
            f"the model is a {type(model).__name__}, not a torch.nn.Module. Regions are calls of modules. "
            "Wrap the computation in an nn.Module; give several models as a list, a tuple or a mapping."
        )
    models = [model.get_submodule(path) for path in paths_of_models(model)] or [model]
    if any(isinstance(one, torch.nn.DataParallel) for one in models):
        raise UnsupportedInput(
            "the model is an nn.DataParallel, which copies it into several threads at every step. A plan is for one "
            "forward at a time. Use one process per device (torchrun) instead."
        )
    if any(_is_deepspeed_engine(one) for one in models):
        raise UnsupportedInput(
            "the model is a DeepSpeed engine, which takes the steps itself and shards or offloads what tightfit would "
            "plan. Train the model without it (DistributedDataParallel and FSDP2 are supported), or without tightfit."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedInput(
            f"{name_of(model)} has no parameter that requires a gradient. There is nothing to train. "
            "Unfreeze parameters with requires_grad_(True)."
        )
    if any(is_compiled(one) for one in models):
        raise UnsupportedInput(
            "the model is compiled as a whole with torch.compile, where operations do not pass through PyTorch's "
            "dispatcher and cannot be planned yet. Give tightfit the model as it was before torch.compile, or compile "
            "its blocks one by one (block.compile())."
        )
    if len(models) > 1 and is_sharded(model):
        raise UnsupportedInput(
            "several models were given, and fully_shard has sharded one of them. Plans for sharded parameters are for "
            "one model so far. Put the models into one nn.Module, whose forward calls them, and shard that."
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1 and len(models) > 1:
        places = [f"{path}: {where}" for path, where in _places(model)]
        raise UnsupportedInput(
            f"the models are on several devices ({', '.join(places)}). A budget is for one device. Move them to one."
        )
    if len(devices) > 1:
        raise UnsupportedInput(
            f"the model's parameters are on several devices ({', '.join(sorted(map(str, devices)))}). A budget is for "
            "one device. Move the model to one device."
        )


def _is_deepspeed_engine(module: torch.nn.Module) -> bool:
    """Tell by the names of its classes: DeepSpeed is not imported for that."""
    return any(
        kind.__name__ == "DeepSpeedEngine" and kind.__module__.partition(".")[0] == "deepspeed"
        for kind in type(module).__mro__
    )


def give_gradients(*modules: torch.nn.Module, to: Iterable[torch.Tensor] | None = None) -> None:
    """Make zero gradients where there are none: they are resident from the start, as in every step but the first.

    Those of embeddings that ask for sparse ones are sparse, and empty.

    Args:
        modules: all in which parameters are.
        to: those that get one; by default all that require one.
    """
    below = [part for module in modules for part in module.modules()]
    sparse = {id(module.weight) for module in below if getattr(module, "sparse", False) is True}
    everything = (p for module in modules for p in module.parameters() if p.requires_grad)
    for parameter in everything if to is None else to:
        if parameter.grad is not None:
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


def _places(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    for path in paths_of_models(model):
        found = {str(parameter.device) for parameter in model.get_submodule(path).parameters()}
        yield path, " and ".join(sorted(found)) or "none"


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device of the model's parameters."""
    return next(model.parameters()).device
