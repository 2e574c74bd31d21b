"""What an optimizer's saved state has to be like: any other would fail in the middle of a step, or change what it does.

A checkpoint may come from somebody else, or from another version of PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PROBE_SIZE = 2


def require_state_of(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Check what is about to be loaded into an optimizer.

    Raises:
        ValueError: it is not the state of such an optimizer of these parameters.
        KeyError, TypeError, AttributeError, OverflowError: it is no optimizer's state at all.
    """
    groups = saved["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"the optimizer had {len(groups)} groups of parameters, not {len(optimizer.param_groups)}")
    owned: list[tuple[dict[str, Any], nn.Parameter]] = []
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for name, value in own.items():
            if name != "params" and name in group and not _is_like(group[name], value):
                raise ValueError(f"the optimizer's {name} cannot be {ascii(group[name])[:40]}")
        owned += [(own, parameter) for parameter in own["params"]]
    expected: dict[tuple[int, int], Mapping[str, Any]] = {}
    for number, held in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(owned):
            raise ValueError(f"the optimizer has no parameter {number}")
        own, parameter = owned[number]
        key = id(own), parameter.dim()
        if key not in expected:
            expected[key] = _after_a_step(optimizer, own, parameter)
        if held.keys() != expected[key].keys():
            raise ValueError(f"the optimizer's state of parameter {number} is that of another optimizer")
        for name, like in expected[key].items():
            if not _fits(held[name], like, parameter):
                raise ValueError(f"the optimizer's {name} of parameter {number} does not fit it")


def _after_a_step(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> Any:
    """Return the state that such an optimizer has of a tiny parameter with as many dimensions."""
    probe = nn.Parameter(torch.zeros([_PROBE_SIZE] * parameter.dim(), dtype=parameter.dtype))
    probe.grad = torch.zeros_like(probe)
    settings = {name: value for name, value in group.items() if name != "params"}
    kind: Any = type(optimizer)
    tiny = kind([{**settings, "params": [probe]}])
    tiny.step()
    return tiny.state[probe]


def _fits(value: Any, like: Any, parameter: nn.Parameter) -> bool:
    if not isinstance(like, Tensor):
        return _is_like(value, like)
    shape = tuple(like.shape)
    if like.dim() == parameter.dim():  # along some dimensions it may have one number for all
        sizes = zip(like.shape, parameter.shape, strict=True)
        shape = tuple(own if size == _PROBE_SIZE else size for size, own in sizes)
    return (
        isinstance(value, Tensor)
        and tuple(value.shape) == shape
        and value.is_floating_point() == like.is_floating_point()
        and value.is_complex() == like.is_complex()
    )


def _is_like(value: Any, own: Any) -> bool:
    if isinstance(own, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(own) and all(map(_is_like, value, own))
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, bool)
    if isinstance(own, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is type(own)
