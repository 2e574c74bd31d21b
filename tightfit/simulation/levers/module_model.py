"""The memory of a module call that is made again in backward.  Mirrors `tightfit.replay.executors.module`.

Held are the call's arguments, and nothing that autograd saves.  At the first read, forward is made
again up to the last tensor that it saved; what autograd still wants is held until released.  In reality what a node has
read goes a little earlier, when the node's own operations are done, so the model is above what is measured by as much
as autograd's engine makes in between: the sum of a bias' gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tightfit.records import Event, EventKind, Stretch
from tightfit.simulation.levers.lever import Moment, Requests
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.second_call import made_storages


class ModuleModel:
    """One module call that is recomputed as a whole."""

    def __init__(self, index: ProfileIndex, region: int, events: Sequence[Event]) -> None:
        """`events`: what happens when the call is made again."""
        self._index = index
        self._events = events
        profile = self._profile = index.profile
        record = profile.regions[region]
        ops = range(record.first_op, record.first_op + record.op_count)
        facts = index.facts[region]
        self.slots = facts.again
        """Saved tensors that the decision is about."""
        self.replayed_ops: list[int] = []
        """Operations that run again, in order, once they have."""
        self.requests: Requests | None = None
        """Where the second call writes down what it asks of the allocator; None: nowhere."""
        self._made = made_storages(index.events_between(region))
        # The generator's state before the call is noted; and after it, to see whether anything was random.
        self._state_bytes = profile.random_state_bytes
        self._is_random = any(profile.ops[op].random_state_bytes for op in ops)
        self._begun = self._ended = False
        self._arguments: dict[int, None] = {}  # storages held for the second run
        self._unreleased: set[int] = set()  # slots
        self._read: set[int] = set()  # of those, what a backward was done with that keeps its graph
        self._copies: Counter[int] = Counter()  # storages made by the second run -> slots that hold them

    def handle(self, kind: EventKind, a: int) -> Moment:
        """Return what an event does: OP, SAVE, UNPACK, RELEASE or EXIT of this region."""
        moment = Moment()
        if kind == EventKind.OP:
            self._note(a, moment)
        elif kind == EventKind.SAVE:
            self._unreleased.add(a)
            if self.replayed_ops:  # by a backward inside this one, of what the second call has made
                self._hold(a)
        elif kind == EventKind.UNPACK:
            if not self.replayed_ops:
                self._recompute(moment)
        elif kind == EventKind.READ:
            self._read.add(a)
            if self.replayed_ops:
                moment.memo_delta -= self._let_go(a)
        elif kind == EventKind.RELEASE:
            self._unreleased.discard(a)
            if self.replayed_ops and a not in self._read:
                moment.memo_delta -= self._let_go(a)
            if self._ended and not self._unreleased:
                self._forget(moment)
        elif kind == EventKind.EXIT:
            self._ended = True
            moment.spike = self._state_bytes
            if not self._is_random:
                moment.memo_delta -= self._state_bytes
            if not self._unreleased:
                self._forget(moment)
        return moment

    def _note(self, op: int, moment: Moment) -> None:
        profile = self._profile
        if not self._begun:
            self._begun = True
            moment.memo_delta += self._state_bytes
        for value in profile.ops[op].inputs:
            storage = profile.values[value].storage
            if storage not in self._made and not self._index.is_free(value) and storage not in self._arguments:
                self._arguments[storage] = None
                moment.acquired.append(storage)

    def _forget(self, moment: Moment) -> None:
        """Let go of what was held for the second call: nothing of it is wanted any more."""
        moment.released += self._arguments
        self._arguments = {}
        if self._is_random:
            moment.memo_delta -= self._state_bytes

    def _hold(self, slot: int) -> None:
        """Note that a slot holds what the second call has made, if it is of that."""
        storage = self._profile.values[self._profile.slots[slot].value].storage
        if storage in self._made:
            self._copies[storage] += 1

    def _let_go(self, slot: int) -> int:
        """Return the bytes that go with the release of a slot."""
        storage = self._profile.values[self._profile.slots[slot].value].storage
        if storage not in self._made:
            return 0
        self._copies[storage] -= 1
        if self._copies[storage]:
            return 0
        nbytes = self._profile.storages[storage].nbytes
        if self.requests is not None:
            self.requests.free(_copy_of(storage), nbytes)
        return nbytes

    def _recompute(self, moment: Moment) -> None:
        profile = self._profile
        made = self._made
        references: Counter[int] = Counter()  # of each storage: one of Python's, and one for each saved tensor
        level = highest = self._state_bytes if self._is_random else 0
        again = Stretch.of(profile.module_ms_per_call)
        for kind, a in self._events:
            storage, change = -1, 0
            if kind == EventKind.OP:
                self.replayed_ops.append(a)
                signature = profile.signatures[profile.ops[a].signature]
                again = again.then(Stretch.of(signature.ms + profile.module_ms_per_op, signature.device_ms))
                workspace_bytes = signature.workspace_bytes
                highest = max(highest, level + workspace_bytes)
                if self.requests is not None:
                    self.requests.work(workspace_bytes)
            elif kind in (EventKind.ALLOC, EventKind.FREE):
                storage, change = a, 1 if kind == EventKind.ALLOC else -1
            elif kind == EventKind.SAVE:
                storage, change = profile.values[profile.slots[a].value].storage, 1
            if storage not in made:
                continue
            before, references[storage] = references[storage], references[storage] + change
            if bool(before) != bool(references[storage]):
                nbytes = profile.storages[storage].nbytes
                level += change * nbytes
                if self.requests is not None:
                    ask = self.requests.make if change > 0 else self.requests.free
                    ask(_copy_of(storage), nbytes)
            highest = max(highest, level)
        for slot in self._unreleased:
            self._hold(slot)
        if self.requests is not None:
            for storage, count in references.items():
                if count and storage not in self._copies:
                    self.requests.free(_copy_of(storage), profile.storages[storage].nbytes)
        moment.memo_delta = sum(profile.storages[storage].nbytes for storage in self._copies)
        moment.spike = highest
        moment.added = again


def _copy_of(storage: int) -> int:
    return -1 - storage
