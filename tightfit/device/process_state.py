"""What a process has on its devices, whatever their kind: random states, a capture under way, settings of libraries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from tightfit.device.registry import KINDS


def device_random_states() -> dict[str, list[torch.Tensor]]:
    """Copy the states of the default generators of all devices in use, by kind; the host's is `torch.get_rng_state`."""
    return {kind.kind: states for kind in KINDS if (states := kind.random_states())}


def set_device_random_states(states: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Put the generators back into the `states` that `device_random_states` copied."""
    for kind in KINDS:
        if kind.kind in states:
            kind.set_random_states(states[kind.kind])


def is_capturing() -> bool:
    """Tell whether operations are captured into a device's graph now instead of run."""
    return any(kind.is_capturing() for kind in KINDS)


def may_fork() -> bool:
    """Tell whether a fork of this process could use the devices that it uses."""
    return not any(kind.is_initialized() for kind in KINDS)


@contextmanager
def deterministic_libraries() -> Iterator[None]:
    """Make the libraries behind all kernels choose the same ones every time, inside the context."""
    with ExitStack() as stack:
        for kind in KINDS:
            stack.enter_context(kind.deterministic_libraries())
        yield
