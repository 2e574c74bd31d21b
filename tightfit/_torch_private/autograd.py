"""Autograd's graph, its engine, and the hooks on what it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter, methodcaller
from typing import Any

import torch

#: Set the thread's grad mode inside `below_autograd`, which restores it.  Some kernels read it: `mkldnn_rnn_layer`
#: returns no workspace under no_grad.
set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled


#: The number that the next node of autograd's graph will have in this thread, which rises through forward; and a node's
#: number, which is huge of those that add to a leaf's gradient.
graph_position: Callable[[], int] = torch._C._autograd._get_sequence_nr


position_of_node: Callable[[Any], int] = methodcaller("_sequence_nr")


def top_saved_tensor_hooks() -> object:
    """Return the (pack, unpack) pair on top of this thread's stack of saved-tensor hooks, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def saved_tensor_hooks_allowed() -> bool:
    """Tell whether saved-tensor hooks may be pushed now: not inside `torch.func.grad` and its kin."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]  # not in PyTorch's stubs


@contextmanager
def no_saved_tensor_hooks() -> Iterator[None]:
    """Take all saved-tensor hooks off this thread's stack, inside."""
    hooks = []
    while (top := top_saved_tensor_hooks()) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)  # type: ignore[misc]  # a pair of functions


def has_no_sizes(error: RuntimeError) -> bool:
    """Tell whether an error says that a nested tensor, one of strided layout, was asked what such tensors have not."""
    return "NestedTensorImpl doesn't support" in str(error)


def forbids_saved_tensor_hooks(error: RuntimeError) -> bool:
    """Tell whether an error says that saved-tensor hooks were active where they may not be, as in `torch.func.grad`."""
    return "saved tensor hooks" in str(error)


#: Identify the backward pass that runs in this thread; -1 outside backward.
current_graph_task: Callable[[], int] = torch._C._current_graph_task_id

#: Tell whether the backward pass that runs in this thread was called with ``retain_graph=True``.
backward_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def call_after_backward(callback: Callable[[], None]) -> None:
    """Have something called at the end of the backward pass that runs in this thread, unless that fails."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def current_graph_node() -> Any:
    """Return the autograd node whose backward runs in this thread; None outside backward."""
    return torch._C._current_autograd_node()


#: The class of the autograd nodes that a class of functions makes; its instances are what ``forward`` gets as ``ctx``.
node_class_of: Callable[[Any], type] = attrgetter("_backward_cls")
