"""What one tape holds, in bytes.  Mirrors `tightfit.replay.tape`; see there for why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tightfit.records import Decision, EventKind
from tightfit.records.recompute_tree import RecomputeTree
from tightfit.simulation.levers.lever import NOTHING, Moment
from tightfit.simulation.profile_index import ProfileIndex


class TapeModel:
    """One tape: that of one region, or of several that follow each other (`decisions` has one for each)."""

    def __init__(
        self, index: ProfileIndex, first: int, decisions: Sequence[Decision | None], nest: RecomputeTree | None = None
    ) -> None:
        self._index = index
        profile = self._profile = index.profile
        self._first = first
        self._op_count = sum(region.op_count for region in profile.regions[first : first + len(decisions)])
        self._nest = nest if nest is not None and nest.cuts else None
        facts = self._facts = index.tape_facts(first, len(decisions))
        self.replayed_ops: list[int] = []
        """Operations in the order of their replay, as often as they are replayed."""
        self.needed: frozenset[int] = frozenset()
        """Operations that are replayed at least once."""
        self.slots = frozenset(facts.slots)
        """Savings that the decisions are about."""
        self._memo: dict[int, int] = {}  # value -> bytes
        self._passing: dict[int, int] = {}  # the same, for the replay that goes on
        self._memo_total = 0
        self._refs: Counter[int] = Counter()
        self._readers: Counter[int] = Counter()  # operations of the replay that goes on which are yet to read the value
        self._held: frozenset[int] = frozenset()
        self._dropped: frozenset[int] = frozenset()
        self._sources: set[int] = set()
        self._done: set[int] = set()
        self._last_region = first + len(decisions) - 1
        self._released: list[int] | None = []  # values of slots let go while the tape was recording
        self._position = [0] * len(decisions)
        self._leaf_of_op: dict[int, int] = {}
        self._leaf_of_slot: dict[int, int] = {}
        self._last_leaf: dict[int, int] = {}  # value -> last leaf that uses it
        if any(decision is not None for decision in decisions):
            self._held = index.kept_values(facts, first, decisions)
            self.needed = index.rebuilding_ops(facts, self._held)
            self._dropped = frozenset(s for s in facts.slots if profile.slots[s].value not in self._held)
            for slot in self._dropped:
                self._refs[profile.slots[slot].value] += 1
            for op in self.needed:
                for value in set(profile.ops[op].inputs):
                    self._refs[value] += 1

    def overhead_ms(self, replay_ms: float) -> float:
        """Return what the tape adds to the step: recomputation, and the engine's own work for each operation."""
        if not self.needed:
            return 0.0
        profile = self._profile
        mode_ms = profile.mode_ms_per_op * self._op_count
        # The tape's cost per operation is of one recording and one replay: further replays pay it again.
        taped = max(len(self.needed), len(self.replayed_ops))
        return profile.accumulation_steps * (replay_ms + mode_ms + profile.tape_ms_per_op * taped)

    def is_source(self, value: int) -> bool:
        """The tape reads this value instead of rebuilding it."""
        return value not in self._facts.own or value in self._held or value not in self._facts.droppable

    def handle(self, kind: EventKind, a: int) -> Moment:
        """What the event does: OP, SAVE, UNPACK, RELEASE or EXIT of this tape's regions."""
        profile = self._profile
        if kind == EventKind.EXIT:
            return self._seal() if a == self._last_region else NOTHING
        if kind == EventKind.OP:
            if self._nest is not None:
                self._ran(a)
            return self._record(a) if a in self.needed else NOTHING
        if a not in self.slots:
            return NOTHING
        value = profile.slots[a].value
        moment = Moment()
        if a not in self._dropped:
            if kind == EventKind.SAVE:
                moment.acquired.append(profile.values[value].storage)
            elif kind == EventKind.RELEASE:
                moment.released.append(profile.values[value].storage)
            return moment
        before = self._memo_total
        if kind == EventKind.SAVE:
            if self._nest is not None:
                region = profile.slots[a].region - self._first
                leaf = self._leaf_of_slot[a] = self._nest.leaf_at(region, self._position[region])
                self._last_leaf[value] = max(leaf, self._last_leaf.get(value, 0))
        elif kind == EventKind.UNPACK:
            self._need(value, self._leaf_of_slot.get(a, 0), moment, before)
        elif kind == EventKind.RELEASE and self._released is not None:
            self._released.append(value)
        elif kind == EventKind.RELEASE:
            self._unref(value, moment)
        moment.memo_delta = self._memo_total - before
        return moment

    def _record(self, op: int) -> Moment:
        """The operation is written to the tape: its sources are held from now on."""
        moment = Moment(memo_delta=self._profile.ops[op].random_state_bytes)
        self._memo_total += moment.memo_delta
        for value in self._profile.ops[op].inputs:
            if value not in self._sources and self.is_source(value) and not self._index.is_free(value):
                self._sources.add(value)
                moment.acquired.append(self._profile.values[value].storage)
        return moment

    def _seal(self) -> Moment:
        """The tape's last region has ended."""
        moment = Moment()
        before = self._memo_total
        for value in self._released or ():
            self._unref(value, moment)
        self._released = None
        moment.memo_delta = self._memo_total - before
        return moment

    def _ran(self, op: int) -> None:
        """Note the leaf in which an operation of forward runs, and with it where its values are used."""
        assert self._nest is not None
        region = self._index.region_of_op[op]
        position = op - self._profile.regions[region].first_op
        self._position[region - self._first] = position + 1
        leaf = self._leaf_of_op[op] = self._nest.leaf_at(region - self._first, position)
        if op in self.needed:
            for value in (*self._profile.ops[op].inputs, *self._profile.ops[op].outputs):
                self._last_leaf[value] = max(leaf, self._last_leaf.get(value, 0))

    def _is_held_for(self, value: int, leaf: int) -> bool:
        """Replay for `leaf` memoises the value, because somebody still wants it and its place in the nest says so."""
        if self._refs[value] == 0 or self.is_source(value):
            return False
        if self._nest is None:
            return True
        first = self._leaf_of_op[self._profile.values[value].op]
        return self._nest.holds(first, self._last_leaf[value], leaf)

    def _available(self, value: int) -> bool:
        return value in self._memo or self.is_source(value)

    def _need(self, value: int, leaf: int, moment: Moment, before: int) -> None:
        if self._available(value):
            return
        ops = self._profile.ops
        todo: set[int] = set()
        stack = [value]
        while stack:
            u = stack.pop()
            op = self._profile.values[u].op
            if self._available(u) or op in todo:
                continue
            todo.add(op)
            stack.extend(ops[op].inputs)
        self._readers = Counter(u for op in todo for u in set(ops[op].inputs))
        for op in sorted(todo):
            self._run(op, leaf, moment, before)

    def _run(self, op: int, leaf: int, moment: Moment, before: int) -> None:
        profile, index = self._profile, self._index
        record = profile.ops[op]
        # It need not run again if everything that is still wanted of it stays.
        stays = {value: self._is_held_for(value, leaf) for value in record.outputs}
        finished = all(stays[o] or self._refs[o] == 0 or self.is_source(o) for o in record.outputs)
        for value in record.mutates:  # if only this operation wants it, it is written in place
            if value in self._passing and self._readers[value] == 1:
                self._memo_total -= self._passing.pop(value)
            elif value in self._memo and self._refs[value] == 1 and finished:
                self._memo_total -= self._memo.pop(value)
        new = {value: index.nbytes(value) for value in record.outputs}
        self._memo_total += sum(new.values())
        scratch = profile.signatures[record.signature].scratch_bytes
        # While a random operation runs again, the generator's present state is put aside beside the recorded one.
        moment.spike = max(moment.spike, self._memo_total + scratch + record.random_state_bytes - before)
        self.replayed_ops.append(op)
        for value, nbytes in new.items():
            if stays[value] and value not in self._memo:
                self._memo[value] = nbytes
            elif self._readers[value] > 0 and not self._available(value):
                self._passing[value] = nbytes
            else:  # nobody wants it, or it is held already
                self._memo_total -= nbytes
        if finished:
            self._done.add(op)
            self._memo_total -= record.random_state_bytes
        for value in set(record.inputs):
            if finished:
                self._unref(value, moment)
            self._readers[value] -= 1
            if self._readers[value] == 0 and value in self._passing:
                self._memo_total -= self._passing.pop(value)

    def _unref(self, value: int, moment: Moment) -> None:
        stack = [value]
        while stack:
            u = stack.pop()
            self._refs[u] -= 1
            if self._refs[u] > 0:
                continue
            if u in self._memo:
                self._memo_total -= self._memo.pop(u)
            if u in self._sources:
                self._sources.discard(u)
                moment.released.append(self._profile.values[u].storage)
            op = self._profile.values[u].op
            if (
                op in self.needed
                and op not in self._done
                and all(self._refs[o] == 0 for o in self._profile.ops[op].outputs)
            ):
                self._done.add(op)  # nobody wants its results any more
                self._memo_total -= self._profile.ops[op].random_state_bytes
                stack.extend(set(self._profile.ops[op].inputs))
