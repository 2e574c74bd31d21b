"""Tensors without data on a device that is not here: operations dispatch on them as on CUDA, in any build of PyTorch.

Autograd asks the build for the streams of each tensor's device, and a build without CUDA ends the process at that
question.  So these tensors name ``meta`` as their device, which every build knows, and carry CUDA's dispatch keys: the
kernels, autograd formulas and autocast rules that are found for them are CUDA's.  What asks a tensor in C++ whether it
is on CUDA is told no; `profiling.described` overrides the few operations that then go another way.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from tightfit._torch_private.dispatch import FakeTensor, top_function_mode

#: Where tensors of a described device say that they are.
PLACE = torch.device("meta")
#: What they are dispatched as, and what a model's code sees.
SEEN_AS = torch.device("cuda", 0)


@contextmanager
def dispatching_as_cuda(naming: type[TorchFunctionMode]) -> Iterator[None]:
    """Give fake tensors of ``meta`` that are made inside the dispatch keys of CUDA.

    `naming`: a function mode, which a model's code runs in and what PyTorch calls itself does not. There, where it is
    the innermost, they say that they are on CUDA.
    """
    asked: Any = FakeTensor.device
    make = torch.Tensor._make_subclass

    def make_subclass(cls: Any, data: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_for_backend_keys") == PLACE:
            kwargs["device_for_backend_keys"] = SEEN_AS
        return make(cls, data, *args, **kwargs)

    def device(tensor: FakeTensor) -> torch.device:
        place: torch.device = asked.fget(tensor)
        return SEEN_AS if place == PLACE and isinstance(top_function_mode(), naming) else place

    with (
        mock.patch.object(torch.Tensor, "_make_subclass", staticmethod(make_subclass)),
        mock.patch.object(FakeTensor, "device", property(device, asked.fset)),
    ):
        yield


@contextmanager
def kernels(overrides: Mapping[str, Callable[..., Any]], key: str) -> Iterator[None]:
    """Have the dispatcher call these for operations (``dropout``, ``softmax.int``), inside the context.

    Args:
        overrides: the kernels, by the operation's name and overload.
        key: the dispatch key that they are for.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each says that a kernel is overridden, which is the purpose
            for name, kernel in overrides.items():
                library.impl(name, kernel, key)
        yield
    finally:
        library._destroy()


def below_autocast() -> AbstractContextManager[object]:
    """Open a context in which operations are dispatched past CUDA's autocast."""
    guard: AbstractContextManager[object] = torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    )
    return guard


@contextmanager
def autocast_for_cuda(forget: Callable[[], None]) -> Iterator[None]:
    """Let ``torch.autocast("cuda")`` be entered without CUDA; call `forget` where it forgets what it has cast."""
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        clear()
        forget()

    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch, "clear_autocast_cache", clear_both),
    ):
        yield


@cache
def autocast_lists() -> Mapping[str, tuple[str, ...]]:
    """Return the operations that CUDA's autocast treats alike, by the name of the list in PyTorch's own header.

    The lists are macros of ``ATen/autocast_mode.h``, which every wheel of PyTorch brings along, in its own version.
    """
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for name, body in re.findall(r"^#define AT_FORALL_(\w+)\(_\)(.*)$", text, re.MULTILINE):
        plain = re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", body)
        renamed = re.findall(r'ADD_NS\(\w+\),\s*"([\w.]+)"', body)
        found[name] = tuple(".".join(filter(None, one)) for one in plain if one[0] != "ADD_NS") + tuple(renamed)
    return found
