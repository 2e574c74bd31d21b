"""Taking a snapshot of everything a step may change, and putting it back bit for bit."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch


class RandomState:
    """All random generators that a forward may draw from: Python, NumPy (if loaded), PyTorch on CPU and CUDA."""

    def __init__(self) -> None:
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy: Any = numpy.random.get_state() if numpy is not None else None
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Put the generators back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)

    def equals(self, other: RandomState) -> bool:
        """Both snapshots would give the same numbers."""
        if self._python != other._python or not torch.equal(self._torch, other._torch):
            return False
        if (self._numpy is None) != (other._numpy is None) or len(self._cuda) != len(other._cuda):
            return False
        if self._numpy is not None and not all(_same(a, b) for a, b in zip(self._numpy, other._numpy, strict=True)):
            return False
        return all(torch.equal(a, b) for a, b in zip(self._cuda, other._cuda, strict=True))


def _same(a: Any, b: Any) -> bool:
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


class TrainingState:
    """Parameters, buffers, gradients, optimizer state, train/eval flags, plain attributes and random states.

    Copies live in host memory, so that taking a snapshot needs none of the device's.
    """

    def __init__(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._model = model
        self._optimizers = optimizers
        self._tensors = [
            (tensor, _host_copy(tensor)) for tensor in (*model.parameters(), *model.buffers(), *_attributes(model))
        ]
        self._gradients = [(p, p.grad, None if p.grad is None else _host_copy(p.grad)) for p in model.parameters()]
        self._flags = [(module, module.training) for module in model.modules()]
        self._plain = [(module, _plain_attributes(module)) for module in model.modules()]
        self._buffers = [(module, dict(module._buffers)) for module in model.modules()]
        self._states = [_copy_state(optimizer) for optimizer in optimizers]
        self._groups = [
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        self._random = RandomState()

    def restore(self) -> None:
        """Put everything back; tensors keep their identity and storage."""
        with torch.no_grad():
            for module, own_buffers in self._buffers:
                module._buffers.clear()
                module._buffers.update(own_buffers)
            for tensor, saved in self._tensors:
                tensor.copy_(saved)
            for parameter, gradient, saved_gradient in self._gradients:
                parameter.grad = gradient
                if gradient is not None and saved_gradient is not None:
                    gradient.copy_(saved_gradient)
        for module, training in self._flags:
            module.training = training
        for module, attributes in self._plain:
            for name in [n for n in _plain_attributes(module) if n not in attributes]:
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for optimizer, state, groups in zip(self._optimizers, self._states, self._groups, strict=True):
            _restore_state(optimizer, state)
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                for name in [n for n in group if n != "params" and n not in settings]:
                    del group[name]
                group.update(settings)
        self._random.restore()


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach()
    return copied.clone() if copied.device.type == "cpu" else copied.to("cpu")


def _attributes(model: torch.nn.Module) -> list[torch.Tensor]:
    """Plain tensor attributes of modules (not parameters or buffers)."""
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and name not in ("_parameters", "_buffers")
    ]


def _plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """Attributes that forward may rebind: counters, caches, flags. Containers are remembered by a shallow copy."""
    return {
        name: copy.copy(value) if type(value) in (list, dict, set) else value
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules", "forward") and not name.endswith("_hooks")
    }


def _copy_state(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    return {
        key: (
            value,
            {n: (v, _host_copy(v)) if isinstance(v, torch.Tensor) else (v, None) for n, v in value.items()}
            if isinstance(value, dict)
            else None,
        )
        for key, value in optimizer.state.items()
    }


def _restore_state(optimizer: torch.optim.Optimizer, saved: dict[Any, Any]) -> None:
    for key in [k for k in optimizer.state if k not in saved]:
        del optimizer.state[key]
    with torch.no_grad():
        for key, (value, entries) in saved.items():
            optimizer.state[key] = value
            if entries is None:
                continue
            for name in [n for n in value if n not in entries]:
                del value[name]
            for name, (entry, data) in entries.items():
                value[name] = entry
                if data is not None:
                    entry.copy_(data)
