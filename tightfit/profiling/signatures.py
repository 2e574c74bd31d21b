"""The table of distinct ops, each with all that running it alone takes: overload, shapes, strides, dtypes, scalars."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from tightfit._torch_private.fake_calls import CallKey
from tightfit._torch_private.tensors import storage_key
from tightfit.operators.differing_calls import DESCRIBED
from tightfit.profiling.cost_cache import Cost

#: Addresses so far apart are alike to every kernel, so that the steps of a loop over a tensor's parts are one call.
_ALIGNED_BYTES = 512


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor argument without its data."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Of its first element in the storage, less whole steps of `_ALIGNED_BYTES`."""
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    """Size of the storage, which may be larger than the tensor."""


@dataclass(frozen=True, slots=True)
class Call:
    """An operator overload with its arguments, tensors replaced by specs."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    grad_enabled: bool


class SignatureTable:
    """Gives each distinct call a number, in order of first appearance."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.keys: list[str] = []
        """A string that identifies each call, the same in every table."""
        self.result_bytes: dict[int, int] = {}
        """Bytes of the storages that a call allocates for its results, by its number."""
        self.measured: dict[int, Cost] = {}
        """What calls cost that cannot be run alone on made-up data, and were timed where they ran."""
        self._index: dict[str, int] = {}
        self._known: dict[Hashable, int] = {}

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known_by: CallKey | None = None) -> int:
        """Return the call's number; add the call if it is new.

        `known_by`: calls that share it, and autograd's mode, have the same number; None: nothing is known.
        """
        short = None if known_by is None else (torch.is_grad_enabled(), known_by)
        if short is not None and (known := self._known.get(short)) is not None:
            return known
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
        if short is not None:
            self._known[short] = index
        return index

    def record_result(self, index: int, arguments: list[torch.Tensor], result: list[torch.Tensor]) -> None:
        """Record the memory that a call allocated for its results, arguments' own storages left out."""
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
            offset=int(argument.storage_offset()) % (_ALIGNED_BYTES // argument.itemsize),
            dtype=argument.dtype,
            device=argument.device,
            nbytes=argument.untyped_storage().nbytes(),
        )
    if isinstance(argument, list | tuple):
        return tuple(_spec(a) for a in argument)
    if isinstance(argument, torch.Generator):
        return "<generator>"
    if isinstance(argument, torch.UntypedStorage):  # cuDNN's LSTM gives its weights one; its repr reads every byte
        return f"<storage of {argument.nbytes()} bytes>"
    return argument if isinstance(argument, DESCRIBED) else f"<{type(argument).__name__}>"
