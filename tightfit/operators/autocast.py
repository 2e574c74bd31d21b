"""Note how autocast is set in a thread, and set it so again."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

#: For each kind of device whether it is on, and to what it casts; and whether cast weights are remembered.
AutocastState = tuple[tuple[tuple[str, bool, torch.dtype], ...], bool]


def autocast_of(kind: str) -> AutocastState:
    """Return the state of autocast for a kind of device, and for the host."""
    kinds = dict.fromkeys(("cpu", kind))
    states = tuple([(one, torch.is_autocast_enabled(one), torch.get_autocast_dtype(one)) for one in kinds])
    return states, torch.is_autocast_cache_enabled()


def casting_as(wanted: AutocastState) -> AbstractContextManager[Any]:
    """Open a context in which autocast is as `autocast_of` said once."""
    states, remembers = wanted
    if wanted == autocast_of(states[-1][0]):
        return nullcontext()
    stack = ExitStack()
    for kind, enabled, dtype in states:
        stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=remembers))
    return stack
