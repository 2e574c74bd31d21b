"""Tell which checkpointed functions of a model may run as ordinary code, so that a plan decides what is recomputed.

`torch.utils.checkpoint` drops all that a function saves and runs it again.  A plan can do that, too, and anything
between; so the function runs as any other code, as a region or a part of one, and the plan chooses.  Where that would
be another computation than the model's own, the call is left to PyTorch, and the plan says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.dispatch import tree_leaves
from tightfit.operators._checkpoint_private import CheckpointCall
from tightfit.operators.region_names import CHECKPOINT

#: Methods by which a module is called.
_CALLS = ("", "__call__", "_call_impl", "_wrapped_call_impl", "forward")


def checkpoint_path(function: Callable[..., Any]) -> str:
    """Return what stands for a module path where a checkpointed function is a region: the same in every forward."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", function)
    if not isinstance(owner, torch.nn.Module):
        name = getattr(function, "__qualname__", type(function).__qualname__)
    else:
        method = "" if owner is function else getattr(function, "__name__", "")
        name = type(owner).__qualname__ + ("" if method in _CALLS else f".{method}")
    return f"{CHECKPOINT}{name}>"


def reason_to_leave(call: CheckpointCall) -> str:
    """Return why a call cannot be taken over, as far as the call itself tells; empty if it can."""
    if call.has_own_context:
        return "its context_fn may change what it computes"
    if call.is_debugged:
        return "it is being debugged"
    if call.is_reentrant:
        tensors = [one for one in call.args if isinstance(one, torch.Tensor)]
        deeper = [one for one in call.args if not isinstance(one, torch.Tensor)]
        if not any(tensor.requires_grad for tensor in tensors):
            return "none of its arguments requires a gradient, so that the reentrant form gives its weights none"
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(deeper)):
            return "the reentrant form gives no gradient to tensors inside its arguments"
    return ""
