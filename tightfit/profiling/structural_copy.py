"""Copy model, batch and optimizer onto fake tensors, which have shapes but no data.

Only this copy takes part in the fake run.  A fake forward on the user's own model could leave a fake tensor in a cached
attribute, and later real steps would compute with it without an error.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from tightfit._torch_private.dispatch import FakeTensorMode, tree_map
from tightfit._torch_private.modules import default_foreach
from tightfit.collector import uncollected
from tightfit.device.memory import tensors_below
from tightfit.device.tensor_parts import does_not_flatten
from tightfit.distributed._fsdp_private import (
    sharded_modules,
    unsharded_attributes,
    unsharded_class,
    unsharded_parameters,
)

#: Optimizers that take one tensor after another unless they are told otherwise, wherever these are: to save memory.
_SINGLE_BY_DEFAULT = (torch.optim.Adafactor,)


@uncollected()
def copy_model(
    model: torch.nn.Module, mode: FakeTensorMode, place: torch.device | None = None
) -> tuple[torch.nn.Module, dict[int, Any]]:
    """Deep-copy a model onto fake tensors; tied weights stay tied.

    A model that `fully_shard` has sharded is copied as it was before: unsharded.

    Args:
        model: the model.
        mode: the mode that makes fake tensors.
        place: where the copy is to be; None: where the model is.

    Returns:
        The copy, and the memo of `copy.deepcopy`: the copy of each tensor, and of much else, by the original's id.

    Raises:
        TypeError: a module of the model cannot be copied without its data.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'the model'} is a TorchScript module, which copies its data in C++")
    # deepcopy looks each object up in its memo first: with every tensor's fake in it, no data is copied.
    memo: dict[int, Any] = {}
    here = next(model.parameters()).device
    buffers = {id(buffer) for buffer in model.buffers()}
    for parameter in unsharded_parameters(model):
        with mode:
            data = torch.empty(parameter.shape, dtype=parameter.dtype, device=place or parameter.device)
            fake = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
        for tensor in parameter.tensors:
            memo[id(tensor)] = fake
            if tensor.grad is not None:
                memo[id(tensor.grad)] = None
    for tensor in _all_tensors(model):
        if id(tensor) not in memo:
            _require_flattening(tensor)
            moves = place is not None and (tensor.device == here or id(tensor) in buffers)
            memo[id(tensor)] = _moved(tensor, mode, place) if moves else mode.from_tensor(tensor)
            tensor_gradient = tensor.grad if tensor.is_leaf else None
            if tensor_gradient is not None:
                memo[id(tensor_gradient)] = None
    sharded = sharded_modules(model)
    wrappers = [module for module in model.modules() if _copies_as_another(module)]
    for module in sharded + wrappers:
        memo[id(module)] = object.__new__(unsharded_class(module))
    for module in sharded:
        memo[id(module)].__dict__.update(copy.deepcopy(unsharded_attributes(module), memo))
    for module in wrappers:
        memo[id(module)].__dict__.update(copy.deepcopy(vars(module), memo))
    return copy.deepcopy(model, memo), memo


def _copies_as_another(module: torch.nn.Module) -> bool:
    """Tell whether `__deepcopy__` is that of the module it wraps, to which it forwards what it is asked for.

    So do the wrappers of `torch.distributed.algorithms._checkpoint`, around what FSDP2 forbids to copy.
    """
    return hasattr(module, "__deepcopy__") and not hasattr(type(module), "__deepcopy__")


def _all_tensors(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from tensors_below(vars(module))


def _require_flattening(tensor: torch.Tensor) -> None:
    """Raise TypeError where PyTorch's stand-in for a tensor would be no wrapper of others, as that one is."""
    if does_not_flatten(tensor):
        raise TypeError(f"a {type(tensor).__name__} wraps other tensors without PyTorch's flatten protocol")


def _moved(tensor: torch.Tensor, mode: FakeTensorMode, place: torch.device | None) -> torch.Tensor:
    """Return a fake of a tensor at another place, with its geometry and a storage of its own."""
    with mode:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=place)
    return fake.requires_grad_(tensor.requires_grad)


def copy_batch(batch: Any, mode: FakeTensorMode, place: torch.device | None = None) -> Any:
    """Copy a batch with its containers, tensors replaced by fake ones, at `place` or where they are."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        _require_flattening(tensor)
        return mode.from_tensor(tensor) if place is None else _moved(tensor, mode, place)

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return fake(leaf)
        if hasattr(leaf, "__dict__") and any(isinstance(v, torch.Tensor) for v in vars(leaf).values()):
            duplicate = copy.copy(leaf)
            for name, value in vars(leaf).items():
                if isinstance(value, torch.Tensor):
                    setattr(duplicate, name, fake(value))
            return duplicate
        return leaf

    return tree_map(convert, batch)


def copy_optimizer(
    optimizer: torch.optim.Optimizer, fakes: dict[int, Any], foreach: bool | None = None
) -> torch.optim.Optimizer:
    """Make an optimizer of the same class and settings over the fake parameters, with empty state.

    Parameters that are not the model's are left out.

    Args:
        optimizer: the user's optimizer.
        fakes: the fake parameters, by the id of the real ones.
        foreach: whether an optimizer that was not told takes its foreach path; None: as it does with the real ones.
    """
    copied: torch.optim.Optimizer = object.__new__(type(optimizer))
    copied.__dict__.update(optimizer.__dict__)
    for name, value in list(vars(copied).items()):
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            copied.__dict__[name] = OrderedDict()
        elif callable(value) and hasattr(type(optimizer), name):
            del copied.__dict__[
                name
            ]  # a learning-rate scheduler wraps `step`: its wrapper would step the user's own optimizer
    copied.state = defaultdict(dict)
    copied.param_groups = []
    for group in optimizer.param_groups:
        duplicate = dict(group)
        duplicate["params"] = [fakes[id(p)] for p in group["params"] if id(p) in fakes]
        chooses = duplicate.get("foreach", True) is None and not isinstance(optimizer, _SINGLE_BY_DEFAULT)
        if chooses and not duplicate.get("fused"):
            # The optimizer's own choice depends on the tensors' type, which here is FakeTensor.
            duplicate["foreach"] = default_foreach(group["params"]) if foreach is None else foreach
        copied.param_groups.append(duplicate)
    return copied
