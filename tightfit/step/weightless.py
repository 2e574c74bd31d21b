"""Build a model without the memory of its weights, to ask what it would need somewhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn.parameter import UninitializedParameter

from tightfit._torch_private.described import PLACE


@contextmanager
def without_weights() -> Iterator[None]:
    """Let modules that are built inside the context have their parameters on ``meta``, where these take no memory.

    Buffers are made as ever: they are small, and models compute with them while they are built.  Only one parameter
    has memory at a time, before its module takes it.
    """
    register = torch.nn.Module.register_parameter

    def register_parameter(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        there = param is None or param.device == PLACE or isinstance(param, UninitializedParameter)
        if param is not None and not there:
            param = type(param)(param.detach().to(PLACE), requires_grad=param.requires_grad)
        register(module, name, param)

    with mock.patch.object(torch.nn.Module, "register_parameter", register_parameter):
        yield
