"""Hold a saved tensor that wraps others as its parts, some of which the plan drops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.tensors import version_counter_of_wrapper, version_of
from tightfit.operators.wrapper_tensors import Parts
from tightfit.replay.refusals import modified_error


class TakenApart:
    """What autograd holds instead of a wrapper, with the version that plain autograd would have checked."""

    __slots__ = ("_counter", "_dtype", "_parts", "_size", "_version")

    def __init__(self, tensor: torch.Tensor, parts: Parts) -> None:
        self._parts = parts
        self._counter = version_counter_of_wrapper(tensor)
        self._version = version_of(tensor)
        self._dtype, self._size = tensor.dtype, tensor.size()

    def read(self, unpack: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Return the wrapper; raise as plain autograd does if it was written after being saved."""
        if version_of(self._counter) != self._version:
            raise modified_error(self._dtype, self._size, version_of(self._counter), self._version)
        return self._parts.read(unpack)
