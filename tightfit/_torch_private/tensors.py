"""Tensors: their storages, versions, aliases and hooks."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from tightfit._torch_private.dispatch import no_function_modes

#: A tensor's version counter: the number of in-place writes to its storage, which autograd compares at unpack.
#: `attrgetter` is the fastest way to read it.
version_of: Callable[[torch.Tensor], int] = attrgetter("_version")


#: Address of a tensor's StorageImpl, without building a Python storage object: a tape reads it for every argument.
storage_key: Callable[[torch.Tensor], int] = torch._C._storage_id  # type: ignore[attr-defined]  # not in PyTorch's stubs


_ADINPLACE = torch._C.DispatchKey.ADInplaceOrView


class WeakStorage:
    """A weak reference that reserves a StorageImpl's address without keeping its bytes alive."""

    __slots__ = ("_pointer",)

    def __init__(self, tensor: torch.Tensor) -> None:
        # The public weakref.ref(storage) reports when the storage dies; only this reference reserves its address.
        self._pointer = tensor.untyped_storage()._weak_ref()

    @property
    def key(self) -> int:
        """The `storage_key` of the tensors that lie there."""
        pointer: Any = self._pointer
        return int(pointer)

    def __del__(self, free: Callable[[Any], None] = torch.UntypedStorage._free_weak_ref) -> None:
        if hasattr(self, "_pointer"):  # not in an object whose `__init__` has failed, or was never called
            free(self._pointer)


#: A detached alias of a strided tensor that shares its version counter, made without a dispatch: `detach()` would go
#: through the mode that records a region, at every saved tensor.  Inside `__torch_dispatch__` use `alias` instead.
alias_outside_dispatch: Callable[[type[torch.Tensor], torch.Tensor], torch.Tensor] = torch.Tensor._make_subclass


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a detached alias that shares the version counter.

    Inside `__torch_dispatch__` a bare `detach()` gets a counter of its own, because the ADInplaceOrView key is excluded
    there.  Later in-place writes would then go unnoticed.
    """
    with torch._C._SetExcludeDispatchKeyGuard(_ADINPLACE, False):
        return tensor.detach()


def version_counter(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor that shares the tensor's version counter but keeps none of its memory alive."""
    with torch._C._SetExcludeDispatchKeyGuard(_ADINPLACE, False), torch._C._DisableTorchDispatch():
        counter = tensor.detach()
        counter.data = _EMPTY
    return counter


_EMPTY = torch.empty(0)


def version_counter_of_wrapper(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without memory that shares the version counter of one that wraps others."""
    with torch._C._SetExcludeDispatchKeyGuard(_ADINPLACE, False), torch._C._DisableTorchDispatch():
        return tensor.detach()


def set_versions(tensors: list[torch.Tensor], versions: list[int]) -> None:
    """Set the version counters of tensors whose contents are again those of that version."""
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def tensor_hooks(tensor: torch.Tensor) -> dict[str, dict[int, Any] | None]:
    """Return a tensor's hook dictionaries by kind, None for a kind it never had. There is no public list of hooks."""
    return {name: getattr(tensor, name) for name in _TENSOR_HOOKS}


def drop_tensor_hooks(tensor: torch.Tensor, kind: str) -> None:
    """Reset the tensor's hooks of this kind to the state in which it never had one."""
    setattr(tensor, kind, None)


def storage_bytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor's storage in bytes, unseen by function modes: no memory is handed out here."""
    with no_function_modes():
        return tensor.untyped_storage().nbytes()


def is_allocated(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's memory is PyTorch's own, not NumPy's, a file's or another process's."""
    return tensor.untyped_storage().resizable()


def is_view(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor is a view in autograd's sense, which holds a reference to its base."""
    return tensor._is_view()


#: The tensor that a view is of; None for what is no view in autograd's sense.
base_of_view: Callable[[torch.Tensor], torch.Tensor | None] = attrgetter("_base")


def is_conj_or_neg(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor has the lazy conjugate or negative bit set."""
    return tensor.is_conj() or tensor.is_neg()


def with_lazy_bits(tensor: torch.Tensor, conj: bool, neg: bool) -> torch.Tensor:
    """Return a view of the same bytes, read as conjugated and/or negated (lazy bits)."""
    if conj:
        tensor = torch._conj(tensor)
    return torch._neg_view(tensor) if neg else tensor


def has_storage(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has a storage of its own: not one that a transform of `torch.func` has wrapped."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
