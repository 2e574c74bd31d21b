"""The time of a step as rows of a linear program.

Where a device works beside the host, a step ends with the longest of all ways that take the host's time up to some
operation and the device's from it on (see `tightfit.records.Stretch`).  The operation is the way's *cut*.  What a way
takes is a sum over the columns that are chosen, so the step's time is a variable that is at least as large as each
way.  Any set of ways bounds it from below; those that an answer violates are added, until none does.

Ways that change over in the midst of a recomputation are left out, as where that happens is no part of the plain step.

Where the host computes itself, the only way is that of all its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tightfit.records import Stretch
from tightfit.simulation.profile_index import ProfileIndex

Array = np.ndarray[Any, np.dtype[Any]]

#: How much longer than those known a way has to be to be added, in parts of the plain step.
_LONGER = 1e-7


class Cut(NamedTuple):
    """The operation at which a way changes from the host to the device."""

    event: int
    """Of one pass; -1: before all, the number of events: after all."""
    passes_before: int
    """Whole passes of which the host's time counts."""
    passes_after: int
    """Whole passes of which the device's time counts."""

    def counts(self, event: int) -> tuple[int, int]:
        """Return how often the host's and the device's time of work within an event count."""
        return self.passes_before + (event < self.event), self.passes_after + (event > self.event)

    def added_ms(self, work: Iterable[tuple[int, Stretch]]) -> float:
        """Return what work within events of a pass adds to the way."""
        total_ms = 0.0
        for event, stretch in work:
            host, device = self.counts(event)
            total_ms += host * stretch.host_ms + device * stretch.device_ms
        return total_ms


class TimeCuts:
    """The ways of one profile."""

    def __init__(self, index: ProfileIndex) -> None:
        profile = index.profile
        self._event_count = len(profile.events)
        last = profile.accumulation_steps - 1
        ends = Cut(self._event_count, last, 0)
        #: Those to begin with.
        self.first: tuple[Cut, ...] = (ends,)
        self._base_ms = {ends: 0.0}
        self._longer_ms = _LONGER * index.plain_step_ms
        if not index.has_device_times:
            return
        self.first = (ends, Cut(-1, 0, last))
        self._list(index, last)

    @property
    def is_single(self) -> bool:
        """Whether there is one way only."""
        return len(self.first) == 1

    def _list(self, index: ProfileIndex, last: int) -> None:
        """Write down all ways, and how much longer than the plain step each is before anything is recomputed."""
        host, device, optimizer = index.planned_work  # the plain step is no answer where something is asked for
        events = [time for time in range(self._event_count) if host[time] or device[time]]
        host_ms, device_ms = sum(host[:optimizer]), sum(device[:optimizer])
        upto = np.cumsum(host)
        after = np.cumsum(device[::-1])[::-1]
        cuts = list(self.first)
        base = [last * host_ms + sum(host), last * device_ms + sum(device)]
        for event in events:
            ways = {(last, 0)} if event >= optimizer else {(0, last), (last, 0)}
            for before, behind in sorted(ways):
                cuts.append(Cut(event, before, behind))
                base.append(before * host_ms + float(upto[event]) + float(after[event]) + behind * device_ms)
        self._cuts = cuts
        self._bases = np.array(base) - index.plain_step_ms
        self._base_ms = dict(zip(cuts, self._bases.tolist(), strict=True))
        self._events = np.array([cut.event for cut in cuts])
        self._before = np.array([cut.passes_before for cut in cuts])
        self._after = np.array([cut.passes_after for cut in cuts])

    def base_ms(self, cut: Cut) -> float:
        """Return the way's time before anything is recomputed, less the plain step's own."""
        return self._base_ms[cut]

    def longest(self, work: Sequence[tuple[Array, Array, Array, float]]) -> tuple[Cut, float]:
        """Return the longest way, and its time less the plain step's.

        `work`: events, times of the host and of the device, and a weight.
        """
        # Before each event, and after it; the first place is for -1.
        host, device = (np.zeros(self._event_count + 2) for _ in range(2))
        for events, host_ms, device_ms, weight in work:
            np.add.at(host, events + 1, host_ms * weight)
            np.add.at(device, events + 1, device_ms * weight)
        until = np.cumsum(host) - host
        behind = device.sum() - np.cumsum(device)
        ways = self._bases + self._before * host.sum() + self._after * device.sum()
        ways = ways + until[self._events + 1] + behind[self._events + 1]
        best = int(ways.argmax())
        return self._cuts[best], float(ways[best])

    def is_longer(self, ms: float, known_ms: float) -> bool:
        """Tell whether a way is so much longer that it has to be added."""
        return ms > known_ms + self._longer_ms
