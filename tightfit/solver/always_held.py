"""What a region holds under every choice of values: saved tensors that only a second call of its module rebuilds."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tightfit.records import EventKind
from tightfit.simulation.profile_index import ProfileIndex


class AlwaysHeld:
    """The storages, with the times from which and until which they are held."""

    def __init__(self, index: ProfileIndex, region: int, counted: Collection[int]) -> None:
        """Find them; `counted`: storages that whoever asks counts already."""
        self._index = index
        self._spans: list[tuple[int, int, int]] = []
        profile, slots = index.profile, index.facts[region].only_again
        saved: dict[int, int] = {}
        for time in index.events_of_region[region] if slots else ():
            kind, a = profile.events[time]
            if kind == EventKind.SAVE and a in slots:
                saved[a] = time
            elif kind == EventKind.RELEASE and a in saved:
                storage = profile.values[profile.slots[a].value].storage
                if storage not in counted:
                    self._spans.append((storage, saved[a], time))

    def cost(
        self, region: int, private: Mapping[int, float], shared: Mapping[tuple[int, int, int], float],
        others: Collection[int],
    ) -> float:  # fmt: skip
        """Return what it costs at these prices of a byte at a time; `others`: storages that other regions hold, too."""
        total = 0.0
        for time, price in private.items() if self._spans else ():
            for storage in {one for one, start, end in self._spans if start <= time < end}:
                if not self._index.fixed_at(storage, time):
                    priced = shared.get((time, storage, region), 0.0) if storage in others else price
                    total += priced * self._index.profile.storages[storage].nbytes
        return total
