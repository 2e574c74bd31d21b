"""The model's parameters sharded over the processes by PyTorch's FSDP2."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from tightfit._torch_private.modules import own_parameters
from tightfit.device import device_for
from tightfit.distributed.dtensor import is_dtensor, local_shard
from tightfit.distributed.process_group import ProcessGroup
from tightfit.errors import UnsupportedInput
from tightfit.train.optimizers import OptimizerName


def shard(model: nn.Module, group: ProcessGroup, device: torch.device, compute_dtype: torch.dtype | None) -> None:
    """Shard the parameters in place: block by block, and what is left as one unit with the model itself.

    Args:
        model: with the same weights in every process.
        group: the processes; all call this.
        device: this process's.
        compute_dtype: what weights are gathered in and forward computes in; gradients are summed, and the model's
            results returned, in float32. None: all is in the weights' own dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_for(device).mesh_kind, (group.world_size,))
    within, outermost = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if compute_dtype is not None:
        within = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32)
        outermost = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for unit in units_of(model):
        fully_shard(unit, mesh=mesh, mp_policy=within)
    fully_shard(model, mesh=mesh, mp_policy=outermost)


def can_be_cast(model: nn.Module) -> bool:
    """Whether all weights may be gathered in a smaller dtype.  Those of normalisation with running statistics may not:
    the statistics stay float32, and PyTorch's kernels want the weights to be like them.  Autocast serves such models.
    """
    return not any(getattr(module, "running_mean", None) is not None for module in model.modules())


def check_can_shard(optimizer: OptimizerName, compute_dtype: torch.dtype | None) -> None:
    """Raise `UnsupportedInput` for what does not work on shards."""
    if optimizer == "adafactor":
        raise UnsupportedInput(
            "--optimizer adafactor keeps statistics of whole rows and columns, but --strategy fsdp gives each process "
            "a shard of them. Choose another optimizer, such as adamw, or --strategy ddp."
        )
    if compute_dtype is torch.float16:
        raise UnsupportedInput(
            "--precision fp16 scales the loss, which is not built for --strategy fsdp. Use --precision bf16."
        )


def units_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks whose weights are gathered one after the other: the outermost modules that are repeated in a
    `ModuleList` or `Sequential`, unless they share a parameter with something else.
    """
    uses = _uses(model)
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        is_chain = isinstance(module, nn.ModuleList | nn.Sequential)
        kinds = Counter(type(child) for child in module.children())
        for child in module.children():
            if is_chain and kinds[type(child)] > 1 and _stands_alone(child, uses) and _has_forward(child):
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def _stands_alone(block: nn.Module, uses: Counter[int]) -> bool:
    """Whether the block has parameters, and nothing outside of it has them, too."""
    inside = _uses(block)
    return bool(inside) and all(uses[key] == count for key, count in inside.items())


def _uses(model: nn.Module) -> Counter[int]:
    """Count the names that each parameter has."""
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    return Counter(
        id(parameter) for module in modules for parameter in own_parameters(module).values() if parameter is not None
    )


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def unsharded(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor to the full one, on each process; all of them call this.  Any other stays as it is."""
    if not is_dtensor(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]  # a DTensor's
    return full


def distributed_like(shard: Tensor, like: Tensor) -> Tensor:
    """Return a shard as a distributed tensor with the placements of another."""
    from torch.distributed.tensor import DTensor

    like_: Any = like
    distributed: Tensor = DTensor.from_local(
        shard.to(local_shard(like).device), like_.device_mesh, like_.placements, shape=like.shape, stride=like.stride()
    )
    return distributed
