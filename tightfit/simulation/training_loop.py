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

#: Forward's thread, and autograd's: each has a handle of cuBLAS, and takes a workspace for it from PyTorch's allocator
#: when it first multiplies (``CublasHandlePool.cpp``).
_THREADS = 2


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
    begins_with_states: bool = False,
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
        begins_with_states: the optimizer makes its state when it is made, as Adagrad does, not in its first step.

    Raises:
        OutOfDeviceMemory: it does not run under the cap.
    """
    loop = _Loop(step, state, clearing, state.cap_bytes if cap_bytes is None else cap_bytes)
    loop.keeps_batch = keeps_batch
    if begins_with_states:
        loop.make_states()
    for number in range(iterations):
        loop.iterate(makes_states=number == 0 and not begins_with_states)
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
        for nbytes in step.held:
            self.allocator.allocate(nbytes)
        # One workspace of each of the two threads that multiply matrices: they are made in turn, not as one.
        self._workspace_bytes = state.beside_bytes // _THREADS
        self._threads = 0
        self._batch: list[int] = []
        self.keeps_batch = True

    def make_states(self) -> None:
        """Make the optimizer's state."""
        for nbytes in self._step.states:
            self.allocator.allocate(nbytes)

    def iterate(self, *, makes_states: bool) -> None:
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
        self._begin_thread(0)
        self._ask(step.forward_backward[: step.backward_at])
        self._begin_thread(1)
        self._free(self._named)
        if self._clearing is Clearing.BEFORE_BACKWARD:
            self._clear()
        self._ask(step.forward_backward[step.backward_at :])
        # Not seen to be made; sizes are not told apart.
        self._gradients += [self.allocator.allocate(nbytes) for nbytes in step.gradients[len(self._gradients) :]]
        if makes_states:
            self.make_states()
        self._ask(step.optimizer)
        self._named = list(self._addresses.values())
        self._addresses = {}
        if self._clearing is Clearing.LAST:
            self._clear()

    def _begin_thread(self, number: int) -> None:
        if number == self._threads and self._workspace_bytes:
            self.allocator.allocate(self._workspace_bytes)
            self._threads += 1

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
