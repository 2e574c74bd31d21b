"""Predict what the allocator reserves for a planned step, by giving the model of the allocator the step's requests.

What a step leaves in the cache is what the next one finds, so steps are repeated until nothing changes any more: the
first one finds no gradients and no optimizer state and makes them in the middle of everything else.  Afterwards
gradients are either kept and set to zero, or freed and made anew; the larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tightfit.records import AllocatorState, Decision, SharedTape
from tightfit.simulation.allocator_settings import AllocatorSettings
from tightfit.simulation.caching_allocator import CachingAllocator, OutOfDeviceMemory
from tightfit.simulation.levers import Requests
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import Simulation, simulate
from tightfit.simulation.step_requests import BECOMES_GRADIENT, StepRequests, requests_of

#: Steps after which the cache is taken to be as it stays. Two equal ones in a row end it earlier.
_MOST_STEPS = 6
#: How often a step may flush the cache: each waits for the device, and asks the driver for everything again.
_MOST_FLUSHES = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """What the allocator does for a step, repeated until nothing changes."""

    peak_bytes: int
    """The most that is reserved, what is held beside the step included."""
    flushes: int = 0
    """How often a step gives the whole cache back because it meets the cap: each waits for the device."""


def simulate_in_totals(
    index: ProfileIndex, decisions: Sequence[Decision | None], shared_tapes: Sequence[SharedTape] = ()
) -> Simulation:
    """Walk the step as `simulate` does, and count all that the process then holds of the device."""
    walked = simulate(index, decisions, shared_tapes)
    profile = index.profile
    state = profile.allocator
    if state is None:
        return walked
    added_bytes = profile.correction_bytes + profile.margin_bytes
    allocated_bytes = walked.peak_bytes - added_bytes + state.beside_bytes
    found = reserved_for(requests_of(index, decisions, shared_tapes), state, passes=profile.accumulation_steps)
    reserved_bytes = max(found.peak_bytes, allocated_bytes)
    return replace(
        walked,
        peak_bytes=reserved_bytes + state.outside_bytes + added_bytes,
        breakdown={
            **walked.breakdown,
            "beside the step": state.beside_bytes,
            "cache": reserved_bytes - allocated_bytes,
            "context": state.outside_bytes,
        },
        allocated_bytes=allocated_bytes,
        reserved_bytes=reserved_bytes,
        flushes=found.flushes,
    )


def reserved_for(step: StepRequests, state: AllocatorState, *, passes: int = 1) -> Reserved:
    """Return what is reserved for a step of so many passes.

    Where it would run out of memory under the process's cap, or flush the cache all the time, that is what it would
    take without one.
    """
    try:
        found = [_Repetition([step], state, passes, keeps).run() for keeps in (False, True)]
        if step.given_gradients:
            found.append(_Repetition([step], state, passes, True).run(gradients_are_given=True))
    except OutOfDeviceMemory:
        return reserved_for(step, replace(state, cap_bytes=None), passes=passes)
    flushes = max(one.flushes for one in found)
    if flushes > _MOST_FLUSHES:
        return reserved_for(step, replace(state, cap_bytes=None), passes=passes)
    return Reserved(peak_bytes=max(one.peak_bytes for one in found), flushes=flushes)


def totals_in_turn(steps: Sequence[StepRequests], state: AllocatorState, *, passes: int = 1) -> int:
    """Return the most bytes that the process holds where steps of one model on batches of several sizes run in turn.

    The first of them finds an empty cache.  What it leaves serves smaller steps, not the other way round.
    """
    uncapped = replace(state, cap_bytes=None)
    found = [_Repetition(steps, uncapped, passes, keeps).run() for keeps in (False, True)]
    return max(one.peak_bytes for one in found) + state.outside_bytes


def saved_by_growing_segments(
    index: ProfileIndex, decisions: Sequence[Decision | None], shared_tapes: Sequence[SharedTape] = ()
) -> int:
    """Return how many bytes less would be reserved for the step with ``expandable_segments:True``."""
    state = index.profile.allocator
    if state is None or AllocatorSettings.parse(state.settings).expandable_segments:
        return 0
    step, passes = requests_of(index, decisions, shared_tapes), index.profile.accumulation_steps
    growing = replace(state, settings=f"{state.settings},expandable_segments:True".lstrip(","))
    return reserved_for(step, state, passes=passes).peak_bytes - reserved_for(step, growing, passes=passes).peak_bytes


class _Repetition:
    """The same steps again and again, one after another."""

    def __init__(
        self, steps: Sequence[StepRequests], state: AllocatorState, passes: int, keeps_gradients: bool
    ) -> None:
        self._steps = steps
        self._passes = passes
        self._keeps_gradients = keeps_gradients
        self._beside_bytes = state.beside_bytes
        self._allocator = CachingAllocator(
            AllocatorSettings.parse(state.settings),
            cap_bytes=None if state.cap_bytes is None else state.cap_bytes - state.beside_bytes,
            capacity_bytes=state.capacity_bytes,
        )
        self._addresses: dict[int, int] = {}
        self._gradients: list[int] = []

    def run(self, *, gradients_are_given: bool = False) -> Reserved:
        allocator, steps = self._allocator, self._steps
        for nbytes in steps[0].held:
            allocator.allocate(nbytes)
        if len(steps) == 1:  # each batch then takes the last one's place
            self._put(steps[0].batch)
        if gradients_are_given:
            self._gradients = self._put(steps[0].given_gradients)
        peak = before = (0, 0)
        for number in range(_MOST_STEPS):
            allocator.reset_peaks()
            flushes = allocator.retries
            for step in steps:
                batch = self._put(step.batch) if len(steps) > 1 else []
                self._take(step, makes_states=number == 0 and step is steps[0])
                for address in batch:
                    allocator.free(address)
            now = allocator.peak_reserved_bytes, allocator.retries - flushes
            peak = max(peak[0], now[0]), now[1]
            if now == before:
                break
            before = now
        return Reserved(peak_bytes=peak[0] + self._beside_bytes, flushes=peak[1])

    def _put(self, sizes: Sequence[int]) -> list[int]:
        return [self._allocator.allocate(nbytes) for nbytes in sizes]

    def _take(self, step: StepRequests, makes_states: bool) -> None:
        allocator = self._allocator
        passes, seen = self._passes, dict[object, int]()
        number = 0
        while number < passes:
            number += 1
            flushes = allocator.retries
            self._ask(step.forward_backward)
            # Not seen to be made; sizes are not told apart.
            self._gradients += self._put(step.gradients[len(self._gradients) :])
            # What was left once is left again: all that follows has been seen, too, up to where passes end.
            if number < passes and allocator.retries == flushes and (now := allocator.layout()) is not None:
                if now in seen:
                    passes = number + (passes - number) % (number - seen[now])
                seen[now] = number
        if makes_states:
            self._put(step.states)
        self._ask(step.optimizer)
        if not self._keeps_gradients:
            for address in self._gradients:
                allocator.free(address)
            self._gradients = []

    def _ask(self, requests: Requests) -> None:
        allocate, free, addresses = self._allocator.allocate, self._allocator.free, self._addresses
        are_there = bool(self._gradients)
        for thing, nbytes, stream in requests:
            if nbytes > 0:
                before = addresses.get(thing)  # of the last pass, as a loop's variables hold it
                addresses[thing] = allocate(nbytes, stream)
                if before is not None:
                    free(before)
            elif nbytes == BECOMES_GRADIENT and not are_there:
                self._gradients.append(addresses.pop(thing))
            else:
                free(addresses.pop(thing))
