"""What a stretch of a step takes where the host submits work and a device does it: a max-plus product.

An operation takes *host* time until it is submitted, and *device* time from then on, once the device is done with all
that was submitted before.  So the end of a step is that of the longest of all ways that take the host's time up to some
operation and the device's from it on:

    end = max over operations k of (host time of all up to k + device time of all from k on)

Where the device is behind, the host's work costs nothing; where it waits for the host, its own does.  Where the host
computes itself there is no device time, and the end is the host's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Stretch:
    """Operations that are submitted one after another, to a device that has nothing to do before."""

    host_ms: float = 0.0
    """When the host has submitted all."""
    device_ms: float = 0.0
    """How long the device works."""
    ms: float = 0.0
    """When both are done: at least either, at most their sum."""

    @classmethod
    def of(cls, host_ms: float, device_ms: float = 0.0) -> Stretch:
        """Return the stretch of one operation."""
        return cls(host_ms, device_ms, host_ms + device_ms)

    def then(self, other: Stretch) -> Stretch:
        """Return this stretch and, without waiting in between, the other."""
        return Stretch(
            self.host_ms + other.host_ms,
            self.device_ms + other.device_ms,
            max(self.ms + other.device_ms, self.host_ms + other.ms),
        )

    def times(self, count: int) -> Stretch:
        """Return the stretch `count` times in a row.

        How long a way is rises or falls steadily with the repetition in which it changes from the host to the device,
        so the longest changes in the first or in the last.
        """
        before = count - 1
        return Stretch(
            count * self.host_ms,
            count * self.device_ms,
            self.ms + before * max(self.host_ms, self.device_ms),
        )


class StepWork(NamedTuple):
    """What a step takes the host and the device, by event of the timeline."""

    host_ms: Sequence[float]
    device_ms: Sequence[float]
    optimizer: int
    """The event with which the optimizer's part begins; what is before it is done once in each pass."""


def step_ms(plain: StepWork, added: Mapping[int, Stretch], passes: int) -> float:
    """Return the time of a step, which begins and ends with nothing submitted.

    Args:
        plain: what the plain step does.
        added: by event before the optimizer's, what is done there in each pass beside it.
        passes: how often what is before the optimizer's part is done.
    """
    host_ms = device_ms = end_ms = 0.0  # as `Stretch.then`, for each event
    for time, (host, device) in enumerate(zip(plain.host_ms, plain.device_ms, strict=True)):
        if time == plain.optimizer:
            host_ms, device_ms, end_ms = _stretch(host_ms, device_ms, end_ms, passes)
        if host or device:
            host_ms += host
            device_ms += device
            end_ms = max(end_ms, host_ms) + device
        more = added.get(time)
        if more is not None:
            end_ms = max(end_ms + more.device_ms, host_ms + more.ms)
            host_ms += more.host_ms
            device_ms += more.device_ms
    if plain.optimizer >= len(plain.host_ms):
        host_ms, device_ms, end_ms = _stretch(host_ms, device_ms, end_ms, passes)
    return max(host_ms, end_ms)


def _stretch(host_ms: float, device_ms: float, end_ms: float, passes: int) -> tuple[float, float, float]:
    all_passes = Stretch(host_ms, device_ms, max(host_ms, end_ms)).times(passes)
    return all_passes.host_ms, all_passes.device_ms, all_passes.ms
