"""Undoing a step that failed before its optimizer ran: what forward and backward have changed is put back.

Weights and optimizer state are as they were then, and the next step zeroes the gradients.  So it is buffers (the
statistics of BatchNorm, counters), random generators, and plain attributes of the user's modules.  Objects of other
kinds, such as an iterator that a module draws from, are beyond this.

Copies of a CPU's buffers lie in a temporary file, those of a GPU's in pinned host memory: no budget holds them, and
no step waits for one.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from tightfit._torch_private.tensors import version_of
from tightfit.device import device_for
from tightfit.distributed.dtensor import local_shard
from tightfit.step.host_copy import CopyFile, HostCopy
from tightfit.step.snapshot import RandomState, is_users

_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple)
_CONTAINERS = (list, dict, set, deque)


class _PinnedCopy:
    """The contents of a GPU's tensor, copied beside its other work."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)

    def restore(self, tensor: Tensor) -> None:
        tensor.copy_(self._copy)


class StepUndo:
    """Remembers what a step may change before its optimizer runs, and puts it back."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if is_users(type(module))]
        # The kernels of normalisation write running statistics without raising their versions.
        self._unversioned = {
            id(buffer)
            for module in model.modules()
            if getattr(module, "running_mean", None) is not None
            for buffer in module.buffers(recurse=False)
        }
        self._buffers = list(model.buffers())
        self._copies: dict[int, tuple[int, HostCopy | _PinnedCopy]] = {}
        self._attributes: list[dict[str, Any]] = []
        self.note()

    def note(self) -> None:
        """Remember how things are now, before a step."""
        file = CopyFile()
        for buffer in self._buffers:
            known = self._copies.get(id(buffer))
            if known is None or known[0] != version_of(buffer) or id(buffer) in self._unversioned:
                shard = local_shard(buffer).detach()
                is_here = device_for(shard).is_host
                copy = HostCopy(shard, file) if is_here else _PinnedCopy(shard)
                self._copies[id(buffer)] = version_of(buffer), copy
        self._attributes = [_plain_attributes(module) for module in self._modules]
        self._random = RandomState()

    @torch.no_grad()
    def undo(self) -> None:
        """Put everything back as it was when it was last noted."""
        for buffer in self._buffers:
            self._copies[id(buffer)][1].restore(local_shard(buffer).detach())
        for module, attributes in zip(self._modules, self._attributes, strict=True):
            for name in _plain_attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            for name, value in attributes.items():
                vars(module)[name] = value
        self._random.restore()


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes that hold plain data, containers copied; not PyTorch's registries."""
    return {
        name: value.copy() if isinstance(value, _CONTAINERS) else value
        for name, value in vars(module).items()
        if name not in _REGISTRIES and isinstance(value, (*_PLAIN, *_CONTAINERS))
    }


#: What every module has.
_REGISTRIES = frozenset(vars(nn.Module()))
