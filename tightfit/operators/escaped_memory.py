"""Notice a tensor's memory being handed out: `numpy()`, `data_ptr()` and their kin.

Who has the address may write there at any moment, past the dispatcher and past version counters.  Such a tensor is
therefore held as plain autograd holds it, and nothing that reads it is replayed.  What `.data` gives needs no watching:
it is a tensor, and operations on it are seen.

Blind spots: C++ functions that take a tensor without being registered operators, `torch.utils.dlpack.to_dlpack` (not
`Tensor.__dlpack__`), and memory that PyTorch was given (`torch.from_numpy`), whose address was always known.  The
checksums of a region's self-check, at its first call, are for these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tightfit._torch_private.compiling import never_compiled
from tightfit._torch_private.dispatch import follow_dispatch_stack
from tightfit.operators.asking_for_modes import leave_modes_in_graph
from tightfit.operators.facts import tensors_in

_HANDS_OUT_MEMORY = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.__array__,
        torch.Tensor.__dlpack__,
        torch.Tensor.data_ptr,
        torch.Tensor.untyped_storage,
        torch.Tensor.storage,
        torch.Tensor.__cuda_array_interface__.__get__,
    }
)

_BACKWARDS = frozenset({torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward})
_WATCHED = _HANDS_OUT_MEMORY | _BACKWARDS

#: In eval mode and without gradients these take another kernel, but only while no function mode is on.
_FAST_PATHS = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerEncoder)


class MemoryWatch(TorchFunctionMode):
    """Tell of each tensor whose memory is handed out, from where on it may be written unseen.

    Not of parameters, which kernels only read.  In a backward that begins meanwhile, our modes are left where formulas
    ask for them (see `asking_for_modes`).
    """

    def __init__(self, on_exposed: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._on_exposed = on_exposed
        self.is_behind = False
        """A compiled call has ended, and may have put the thread's dispatch keys back to what they were before it."""

    def activate(self) -> None:
        """Push it on this thread's stack of function modes."""
        self.__enter__()  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def deactivate(self) -> None:
        """Pop it from the stack; it must be on top."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    @never_compiled
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_behind:
            self.is_behind = False
            follow_dispatch_stack()
        if func in _WATCHED:
            self._note(func, args[0] if args else None)
        return func(*args, **kwargs) if kwargs else func(*args)

    def _note(self, func: Any, given: Any) -> None:
        if func in _BACKWARDS:  # from its roots on: a node that is met later does not lead to those beside it
            for root in tensors_in((given,)):
                if root.grad_fn is not None:
                    leave_modes_in_graph(root.grad_fn)
        elif type(given) is torch.Tensor and given.layout is torch.strided:
            self._on_exposed(given)


def watching_memory(
    fast_paths: Sequence[torch.nn.Module], on_exposed: Callable[[torch.Tensor], None]
) -> AbstractContextManager[Any]:
    """Return `MemoryWatch` as a context; nothing while one of `fast_paths` is in eval mode."""
    return MemoryWatch(on_exposed) if all(module.training for module in fast_paths) else nullcontext()


def with_fast_paths(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that compute otherwise while a function mode is on, if they are in eval mode."""
    return [module for module in model.modules() if isinstance(module, _FAST_PATHS)]
