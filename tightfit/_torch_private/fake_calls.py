"""Calls of operations on tensors without data, of which a step makes thousands and few that differ.

PyTorch remembers what a fake kernel returned for arguments like these.  But it reaches that memory through the
dispatcher and describes each tensor in seventeen fields for it, which is most of what observing a step takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import _fake_tensor_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_mode_of = torch._C._get_dispatch_mode
_FAKE = torch._C._TorchDispatchModeKey.FAKE

#: Arguments that a call is known by as they are. 1, 1.0 and True are equal, so the type is looked at, too.
_PLAIN = frozenset({int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
#: Where PyTorch remembers, and what it describes a call in; where a version has none, all calls go the long way.
_CACHE = getattr(FakeTensorMode, "cache", None)
_KEY_STATE = getattr(_fake_tensor_utils, "_CacheKeyState", None)
_IS_POSSIBLE = _CACHE is not None and _KEY_STATE is not None and hasattr(FakeTensorMode, "_cache_key")


def _is_plain(metadata: Any) -> bool:
    """Tell whether a result is made from its geometry alone; None describes no tensor that is made."""
    if metadata is None:
        return True
    return metadata.layout is torch.strided and not (metadata.is_conj or metadata.is_neg or metadata.is_inference)


CallKey = tuple[Any, ...]
"""An operation with all that a fake kernel's result may depend on."""


class _Unknown(Exception):
    """An argument that only PyTorch describes in full."""


class FakeCalls:
    """Makes calls below all modes but one of fake tensors; those that it has answered before, sooner.

    What a call returns is what PyTorch's own memory holds for it.
    """

    def __init__(self, mode: FakeTensorMode | None) -> None:
        """`mode`: None makes all calls as they are."""
        usable = _IS_POSSIBLE and mode is not None and mode.shape_env is None and mode.cache_enabled
        self._mode = mode if usable and mode is not None and not mode.cache_crosscheck_enabled else None
        self._known: dict[CallKey, Any] = {}
        """What PyTorch makes a call's results from; None: it has to run the kernel."""

    def known_by(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallKey | None:
        """Return what a call is known by: of two that share it, the results are alike; None where nobody can tell."""
        mode = self._mode
        if mode is None or _mode_of(_FAKE) is not mode or torch._C._len_torch_dispatch_stack() != 1:
            return None
        try:
            return (
                func,
                torch.get_default_dtype(),
                torch._C._get_default_device(),
                torch.is_inference_mode_enabled(),
                *[self._described(one) for one in args],
                *[(name, self._described(one)) for name, one in kwargs.items()],
            )
        except _Unknown:
            return None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known_by: CallKey | None) -> Any:
        """Return ``func(*args, **kwargs)``."""
        if known_by is None:
            return func(*args, **kwargs)
        if known_by not in self._known:
            return self._first(func, args, kwargs, known_by)
        made = self._known[known_by]
        if made is None:
            return func(*args, **kwargs)
        results = [self._result(one, args) for one in made.output_infos]
        return tuple(results) if made.is_output_tuple else results[0]

    def _result(self, info: Any, args: tuple[Any, ...]) -> Any:
        """Return one of a call's results, as ``FakeTensorMode._output_from_cache_entry`` makes it."""
        like = info.metadata
        if like is None:
            return info.constant_value if info.inplace_idx is None else args[info.inplace_idx]
        storage = None if info.view_idx is None else args[info.view_idx].untyped_storage()
        with torch._C._DisableTorchDispatch():
            data = torch.empty_strided(
                like.shape, like.stride, dtype=like.dtype, device="meta", requires_grad=like.requires_grad
            )
            if storage is not None:
                data.set_(storage, like.storage_offset, like.shape, like.stride)
        return FakeTensor(self._mode, data, like.device)

    def _first(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known_by: CallKey) -> Any:
        """Make a call that is unlike all earlier ones, and remember where PyTorch remembers it."""
        mode: Any = self._mode
        assert _KEY_STATE is not None  # else there is no mode, see above
        assert _CACHE is not None
        state = _KEY_STATE(None)
        try:
            key = mode._cache_key(state, func, args, kwargs)  # before the call, which may change its arguments
        except Exception:  # PyTorch does not remember such calls
            key = None
        result = func(*args, **kwargs)
        entry = None if key is None else _CACHE.get(key)
        infos = getattr(entry, "output_infos", None)
        is_plain = infos is not None and all(_is_plain(info.metadata) for info in infos)
        self._known[known_by] = entry if is_plain else None
        return result

    def _described(self, argument: Any) -> Any:
        """Return all of an argument that a fake kernel's result may depend on."""
        kind = type(argument)
        if kind is FakeTensor:
            if (
                argument.fake_mode is not self._mode
                or argument.constant is not None
                or argument.layout is not torch.strided
                or argument.is_quantized
            ):
                raise _Unknown
            return (
                argument.shape,
                argument.stride(),
                argument.dtype,
                argument.fake_device,
                argument.storage_offset(),
                argument.untyped_storage().nbytes(),
                argument.requires_grad,
                argument.is_conj(),
                argument.is_neg(),
                argument.is_inference(),
            )
        if kind is float or kind is complex:
            return kind, repr(argument)  # -0.0 equals 0.0
        if kind in _PLAIN:
            return kind, argument
        if kind is list or kind is tuple:
            return kind, *[self._described(one) for one in argument]
        raise _Unknown
