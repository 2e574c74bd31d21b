"""Predict whether somebody else's training loop runs out of memory, by repeating its step in the allocator's model.

A loop keeps what its variables name until the next iteration gives the names to something else: the old output and loss
are still there while the new ones are made.  And it clears its gradients somewhere: that decides what is alive beside
them.  `reserved_for` assumes the worse of two usual loops; here the loop is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tightfit.records import AllocatorState
from tightfit.simulation.allocator_settings import AllocatorSettings
from tightfit.simulation.caching_allocator import CachingAllocator, OutOfDeviceMemory
from tightfit.simulation.levers.lever import Request
from tightfit.simulation.step_requests import BECOMES_GRADIENT, StepRequests


class Clearing(Enum):
    """Where a loop frees its gradients (``zero_grad(set_to_none=True)``)."""

    NEVER = "never"
    """They are kept, and set to zero."""
    FIRST = "first"
    """Before forward."""
    BEFORE_BACKWARD = "before backward"
    LAST = "last"
    """After the optimizer's step."""


@dataclass(frozen=True, slots=True)
class LoopPeaks:
    """The most that a loop held at any moment, in bytes, without what the process holds outside PyTorch."""

    allocated_bytes: int
    reserved_bytes: int


def run_loop(
    step: StepRequests,
    state: AllocatorState,
    *,
    iterations: int,
    clearing: Clearing,
    cap_bytes: int | None = None,
    keeps_batch: bool = True,
) -> LoopPeaks:
    """Run a loop in the model of the allocator, from an empty cache.

    Args:
        step: what one iteration asks for.
        state: the allocator; its workspaces of libraries are allocated first.
        iterations: how many.
        clearing: where the gradients are freed.
        cap_bytes: the most that may be reserved (``set_per_process_memory_fraction``); None: as the state says.
        keeps_batch: the last batch is there until the next one is. False: its names are those of the host's batch, as
            in ``for x, y in batches: x, y = x.cuda(), y.cuda()``, which frees it first.

    Raises:
        OutOfDeviceMemory: it does not run under the cap.
    """
    loop = _Loop(step, state, clearing, state.cap_bytes if cap_bytes is None else cap_bytes)
    loop.keeps_batch = keeps_batch
    for number in range(iterations):
        loop.iterate(is_first=number == 0)
    return LoopPeaks(loop.allocator.peak_allocated_bytes, loop.allocator.peak_reserved_bytes)


def smallest_cap_bytes(
    step: StepRequests, state: AllocatorState, *, iterations: int, clearing: Clearing, keeps_batch: bool = True
) -> int:
    """Return a cap under which a loop runs, and 2 MiB less is too little: the smallest, if more is never worse."""

    def run(cap_bytes: int | None = None) -> LoopPeaks:
        return run_loop(
            step, state, iterations=iterations, clearing=clearing, cap_bytes=cap_bytes, keeps_batch=keeps_batch
        )

    unit = 2 << 20
    enough = run().reserved_bytes // unit
    too_little = 0
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        try:
            run(middle * unit)
            enough = middle
        except OutOfDeviceMemory:
            too_little = middle
    return enough * unit


class _Loop:
    def __init__(self, step: StepRequests, state: AllocatorState, clearing: Clearing, cap_bytes: int | None) -> None:
        self.allocator = CachingAllocator(
            AllocatorSettings.parse(state.settings), cap_bytes=cap_bytes, capacity_bytes=state.capacity_bytes
        )
        self._step = step
        self._clearing = clearing
        self._addresses: dict[int, int] = {}
        self._named: list[int] = []  # addresses of what the last iteration's variables name
        self._gradients: list[int] = []
        for nbytes in (state.beside_bytes, *step.held):
            if nbytes:
                self.allocator.allocate(nbytes)
        self._batch: list[int] = []
        self.keeps_batch = True

    def iterate(self, *, is_first: bool) -> None:
        """Run one iteration."""
        step = self._step
        last, self._batch = self._batch, []
        if not self.keeps_batch:
            self._free(last)
        self._batch = [self.allocator.allocate(nbytes) for nbytes in step.batch]
        if self.keeps_batch:
            self._free(last)
        if self._clearing is Clearing.FIRST:
            self._clear()
        self._ask(step.forward_backward[: step.backward_at])
        self._free(self._named)
        if self._clearing is Clearing.BEFORE_BACKWARD:
            self._clear()
        self._ask(step.forward_backward[step.backward_at :])
        # Not seen to be made; sizes are not told apart.
        self._gradients += [self.allocator.allocate(nbytes) for nbytes in step.gradients[len(self._gradients) :]]
        if is_first:
            for nbytes in step.states:
                self.allocator.allocate(nbytes)
        self._ask(step.optimizer)
        self._named = list(self._addresses.values())
        self._addresses = {}
        if self._clearing is Clearing.LAST:
            self._clear()

    def _clear(self) -> None:
        self._free(self._gradients)
        self._gradients = []

    def _free(self, addresses: list[int]) -> None:
        for address in addresses:
            self.allocator.free(address)

    def _ask(self, requests: Sequence[Request]) -> None:
        addresses = self._addresses
        are_there = len(self._gradients) == len(self._step.gradients) and bool(self._gradients)
        for thing, nbytes, stream in requests:
            if nbytes > 0:
                addresses[thing] = self.allocator.allocate(nbytes, stream)
            elif nbytes == BECOMES_GRADIENT and not are_there:
                self._gradients.append(addresses.pop(thing))
            else:
                self.allocator.free(addresses.pop(thing))
