"""Take a snapshot of one tensor: which memory it shows, what that holds, and what hangs on the tensor object."""

from __future__ import annotations

import torch

from tightfit._torch_private.tensors import drop_tensor_hooks, storage_key, tensor_hooks, version_of
from tightfit.device.tensor_parts import holds_data
from tightfit.distributed.dtensor import is_dtensor
from tightfit.errors import UnsupportedInput
from tightfit.step.host_copy import HostCopy, Zeros


class TensorSnapshot:
    """A tensor: which storage it shows, what that holds, and everything that hangs on the tensor object."""

    def __init__(self, tensor: torch.Tensor, contents: HostCopy | Zeros | None) -> None:
        self.tensor = tensor
        self.is_distributed = is_dtensor(tensor)  # then what it holds is in its local part
        self.contents = contents
        self.shown = tensor.detach()
        self.requires_grad = tensor.requires_grad
        self.is_leaf = tensor.is_leaf
        self.gradient = tensor.grad if tensor.is_leaf else None
        self.attributes = vars(tensor) if hasattr(tensor, "__dict__") else None
        self.hooks = tensor_hooks(tensor)
        self.version = -1 if tensor.is_inference() else version_of(tensor)

    def is_unchanged(self) -> bool:
        """Tell whether the tensor holds, by its version, what it held."""
        tensor = self.tensor
        return (
            self.version >= 0
            and version_of(tensor) == self.version
            and tensor.layout is torch.strided
            and _shows(tensor, self.shown)
        )

    def restore(self) -> None:
        """Put back what the tensor held, and what hung on it; the version is left to who restores several."""
        tensor = self.tensor
        self.restore_contents()
        if self.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.gradient:
                tensor.grad = self.gradient
        for kind, hooks in tensor_hooks(tensor).items():
            if hooks is not None and self.hooks[kind] is None:
                drop_tensor_hooks(tensor, kind)

    def restore_contents(self) -> None:
        """Put back which memory the tensor shows, and what that held.

        Raises:
            UnsupportedInput: it changed, and its contents were not saved.
        """
        tensor, shown = self.tensor, self.shown
        if self.is_distributed:
            return
        if tensor.layout is torch.strided and not _shows(tensor, shown):
            tensor.data = shown
        if self.contents is not None:
            self.contents.restore(tensor)
        elif self.version >= 0 and version_of(tensor) != self.version and holds_data(tensor):
            raise UnsupportedInput(
                f"a tensor of the model, the optimizer or the batch ({tensor.dtype} {list(tensor.shape)}) was changed "
                "while a copy of them was measured without data, so the loss function reaches past what it is given. "
                "What the tensor held is lost: load the model again, and give a loss function that uses its own "
                "arguments (model, batch) only."
            )


def place_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return which memory a strided tensor shows, and in which way."""
    return storage_key(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _shows(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether both show the same memory in the same way."""
    return place_of(tensor) == place_of(other)
