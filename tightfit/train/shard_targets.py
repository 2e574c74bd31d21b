"""Where the tensors of a checkpoint are read to: each process has room for its own shards only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tightfit.train.shard_files import ShardFiles


def targets_of(
    found: ShardFiles, model: nn.Module | None, optimizer: torch.optim.Optimizer | None
) -> dict[str, Tensor]:
    """Return tensors to read into: the model's own, and, like its parameters, those of the optimizer and the average.

    All that fits nothing of them is read whole, into host memory.
    """
    own = {} if model is None else {name: one for name, one in model.state_dict().items() if isinstance(one, Tensor)}
    groups = [] if optimizer is None else optimizer.param_groups
    like: dict[str, Tensor] = {
        f"optimizer.state.{number}": parameter
        for number, parameter in enumerate(parameter for group in groups for parameter in group["params"])
    }
    targets: dict[str, Tensor] = {}
    for name, held in found.tensors.items():
        kind, _, rest = name.partition(".")
        here = own.get(rest) if kind == "model" else own.get(name.removeprefix("extra.average."))
        parameter = like.get(name.rpartition(".")[0], here)
        if kind == "model" and here is not None and (here.shape, here.dtype) == (held.size, held.properties.dtype):
            targets[name] = here
        elif parameter is not None and parameter.dim() and parameter.shape == held.size:
            targets[name] = torch.empty_like(parameter.detach(), dtype=held.properties.dtype)
        else:
            targets[name] = torch.empty(held.size, dtype=held.properties.dtype)
    return targets
