"""The model of a region that holds whatever autograd saves, as the plain step does."""

from __future__ import annotations

from tightfit.records import EventKind
from tightfit.simulation.levers.lever import NOTHING, Moment, Requests
from tightfit.simulation.profile_index import ProfileIndex


class UntouchedModel:
    """A region without a decision."""

    def __init__(self, index: ProfileIndex, region: int) -> None:
        self._profile = index.profile
        self.slots = frozenset(index.facts[region].slots) | index.facts[region].only_again
        self.replayed_ops: list[int] = []
        self.requests: Requests | None = None

    def handle(self, kind: EventKind, a: int) -> Moment:
        """Return what an event does: what autograd saves is held until it is released."""
        if kind == EventKind.SAVE and a in self.slots:
            return Moment(acquired=[self._profile.values[self._profile.slots[a].value].storage])
        if kind == EventKind.RELEASE and a in self.slots:
            return Moment(released=[self._profile.values[self._profile.slots[a].value].storage])
        return NOTHING
