"""Distinct operations, each with enough to run it alone: operator, shapes, strides, dtypes, devices, scalars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tightfit._torch_private import storage_key


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor argument without its data."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    """Of the whole storage."""


@dataclass(frozen=True, slots=True)
class Call:
    """An operator with its arguments, tensors replaced by specs."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    grad_enabled: bool


class SignatureTable:
    """Numbers distinct calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.keys: list[str] = []
        """What tells each call from others, the same in every table."""
        self.result_bytes: dict[int, int] = {}
        """By call: bytes of the storages that it made."""
        self._index: dict[str, int] = {}

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The call's number, a new one if it was not seen before."""
        call = Call(
            func=func,
            args=tuple(_spec(a) for a in args),
            kwargs=tuple((name, _spec(a)) for name, a in kwargs.items()),
            grad_enabled=torch.is_grad_enabled(),
        )
        key = repr(call)
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self.calls)
            self.calls.append(call)
            self.keys.append(key)
        return index

    def note_result(self, index: int, arguments: list[torch.Tensor], result: list[torch.Tensor]) -> None:
        """Note how much memory the call took for what it returned."""
        if index not in self.result_bytes:
            given = {storage_key(t) for t in arguments if t.layout is torch.strided}
            made = {storage_key(t): t for t in result if t.layout is torch.strided}
            self.result_bytes[index] = sum(t.untyped_storage().nbytes() for k, t in made.items() if k not in given)


def _spec(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        if argument.layout is not torch.strided:
            return f"<{argument.layout} {tuple(argument.shape)}>"
        return TensorSpec(
            size=tuple(argument.size()),
            stride=tuple(argument.stride()),
            offset=int(argument.storage_offset()),
            dtype=argument.dtype,
            device=argument.device,
            nbytes=argument.untyped_storage().nbytes(),
        )
    if isinstance(argument, list | tuple):
        return tuple(_spec(a) for a in argument)
    if isinstance(argument, torch.Generator):
        return "<generator>"
    return argument
