"""What a model's code sees of a described device: tensors on ``cuda:0``, as it would there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tightfit._torch_private.described import PLACE, SEEN_AS

#: Make tensors of data that is on the host, from where it is copied.
_FROM_HOST_DATA = (torch.tensor, torch.as_tensor, torch.asarray)


class DeviceNames(TorchFunctionMode):
    """Translates devices between a model's code, which is on ``cuda``, and tensors, which say that they are elsewhere.

    See `tightfit._torch_private.described` for why they do.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of PyTorch with the names that its tensors go by."""
        if (answer := _ANSWERS.get(func)) is not None and args[0].device == PLACE:
            return answer
        if func is torch.device:
            return func(*args, **kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to(PLACE)
        args = tuple(map(_translated, args))
        kwargs = {name: _translated(value) for name, value in (kwargs or {}).items()}
        if func in _FROM_HOST_DATA and kwargs.get("device") == PLACE:
            del kwargs["device"]
            return func(*args, **kwargs).to(PLACE)
        return func(*args, **kwargs)


#: What is asked of tensors, and the answers. (``device`` is answered by the tensors themselves.)
_ANSWERS: Mapping[Any, object] = {
    torch.Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]  # a getter of C's
    torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]  # a getter of C's
    torch.Tensor.get_device: 0,
}


def _translated(argument: Any) -> Any:
    if isinstance(argument, torch.device) and argument.type == SEEN_AS.type:
        return PLACE
    if isinstance(argument, str) and argument.partition(":")[0] == SEEN_AS.type:
        return PLACE
    return argument
