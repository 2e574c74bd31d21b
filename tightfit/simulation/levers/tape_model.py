"""What one tape holds, in bytes: the schedule that the engine's tape follows, counted instead of run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.records import Decision, EventKind, Stretch
from tightfit.records.recompute_tree import RecomputeTree
from tightfit.simulation.levers.lever import NOTHING, Moment, Requests
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.schedule import Pass, Schedule, ScheduledOp, ScheduledValue


class _Value(ScheduledValue):
    __slots__ = ("is_held", "nbytes", "storage")

    def __init__(self, storage: int, nbytes: int, op: _Op | None, is_source: bool) -> None:
        self.storage = storage
        self.nbytes = nbytes
        self.op = op
        self.source = True if is_source else None
        self.memo: int | None = None  # bytes
        self.refs = 0
        self.last_leaf = 0
        self.is_held = False  # as a source


class _Op(ScheduledOp):
    __slots__ = ("again", "made_bytes", "random_bytes", "workspace_bytes", "written")

    def __init__(self, order: int, random_bytes: int, workspace_bytes: int, again: Stretch) -> None:
        self.order = order
        self.leaf = 0
        self.inputs: list[_Value] = []
        self.outputs: list[_Value] = []
        self.written: list[_Value] = []
        self.demanded = True
        self.done = False
        self.made_bytes = 0
        self.random_bytes = random_bytes
        self.workspace_bytes = workspace_bytes
        self.again = again  # what running it again takes


class TapeModel(Schedule[_Value, _Op]):
    """One tape: that of one region, or of several that follow each other (`decisions` has one for each)."""

    def __init__(
        self,
        index: ProfileIndex,
        first: int,
        decisions: Sequence[Decision | None],
        tree: RecomputeTree | None = None,
    ) -> None:
        self._index = index
        profile = self._profile = index.profile
        self._first = first
        self._tree = tree if tree is not None and tree.cuts else None
        facts = index.tape_facts(first, len(decisions))
        self.replayed_ops: list[int] = []
        """Operations in the order of their replay, as often as they are replayed."""
        several = index.facts[first : first + len(decisions)]
        self.slots = frozenset(facts.slots).union(*(one.only_again for one in several))
        """Saved tensors that the decisions are about."""
        self.requests: Requests | None = None
        """Where replay writes down what it asks of the allocator; None: nowhere."""
        self._made: dict[int, _Value] = {}  # what is asked for, by its number, and not yet known to last
        self._last_region = first + len(decisions) - 1
        self._bytes = 0  # of memos, and of random states that wait for their operation to run again
        self._moment = NOTHING
        self._bytes_before = 0  # the present event
        self._read: set[int] = set()  # slots that a backward was done with that keeps its graph
        self._keeps_graph = index.keeps_graph
        self._for_good = True  # what is freed now is not needed by a further backward
        self._random_kept = 0  # bytes of random states for further backwards
        self._released: list[_Value] | None = []  # values of slots let go while the tape was recording
        self._position = [0] * len(decisions)
        self._leaf_of_slot: dict[int, int] = {}
        self._ops: dict[int, _Op] = {}
        self._taped: Counter[int] = Counter()  # by region: operations
        self._values: dict[int, _Value] = {}
        held = index.kept_values(facts, decisions)
        self._write_down(sorted(index.rebuilding_ops(facts, held)), held | (facts.own - facts.droppable), facts.own)
        self._dropped = {s: self._values[v] for s in facts.slots if (v := profile.slots[s].value) not in held}
        for value in self._dropped.values():
            value.refs += 1

    def _write_down(self, needed: Sequence[int], kept: frozenset[int], own: frozenset[int]) -> None:
        """Set up the operations that are replayed at least once, and the values that they read and make."""
        profile, values = self._profile, self._values

        def found(value: int) -> _Value:
            known = values.get(value)
            if known is None:
                storage = profile.values[value].storage
                is_source = value not in own or value in kept
                known = values[value] = _Value(storage, profile.storages[storage].nbytes, None, is_source)
            return known

        for op in needed:
            record = profile.ops[op]
            signature = profile.signatures[record.signature]
            again = Stretch.of(signature.ms + profile.replay_ms_per_op, signature.device_ms)
            taped = self._ops[op] = _Op(op, record.random_state_bytes, signature.workspace_bytes, again)
            self._taped[self._index.region_of_op[op]] += 1
            for value in dict.fromkeys(record.inputs):
                read = found(value)
                read.refs += 1
                taped.inputs.append(read)
            for value in record.outputs:
                made = found(value)
                made.op = taped
                taped.made_bytes += made.nbytes
                taped.outputs.append(made)
            taped.written = [values[value] for value in record.mutates]

    def handle(self, kind: EventKind, a: int) -> Moment:
        """Return what an event does: OP, SAVE, UNPACK, RELEASE or EXIT of this tape's regions."""
        if kind == EventKind.EXIT:
            return self._exit(a) if self._ops else NOTHING
        if kind == EventKind.OP:
            if self._tree is not None:
                self._ran(a)
            op = self._ops.get(a)
            return NOTHING if op is None else self._record(op)
        value = self._dropped.get(a)
        if value is None:
            return self._keep(kind, a)
        if kind == EventKind.SAVE:
            if self._tree is not None:
                region = self._profile.slots[a].region - self._first
                leaf = self._leaf_of_slot[a] = self._tree.leaf_at(region, self._position[region])
                value.last_leaf = max(leaf, value.last_leaf)
        elif kind == EventKind.UNPACK:
            if value.memo is None:
                self._begin()
                self._for_good = not self._keeps_graph
                self._recompute(value, self._leaf_of_slot.get(a, 0))
                return self._end()
        elif kind == EventKind.READ:
            self._read.add(a)
            self._begin()
            self._for_good = False
            self._give_back([value])
            return self._end()
        elif a in self._read:
            return self._let_go(a)
        elif self._released is not None:
            self._released.append(value)
        else:
            self._begin()
            self._give_back([value])
            return self._end()
        return NOTHING

    def _keep(self, kind: EventKind, slot: int) -> Moment:
        """Return what an event does to a slot that is not dropped."""
        if slot in self.slots:
            storage = self._profile.values[self._profile.slots[slot].value].storage
            if kind == EventKind.SAVE:
                return Moment(acquired=[storage])
            if kind == EventKind.RELEASE:
                return Moment(released=[storage])
        return NOTHING

    def _let_go(self, slot: int) -> Moment:
        """Return what a kept graph's end does: with the last slot goes what further backwards would have needed."""
        self._read.remove(slot)
        self._begin()
        if not self._read:
            held = [value for value in self._values.values() if value.is_held]
            self._moment.released += [value.storage for value in held]
            for value in held:
                value.is_held = False
            self._bytes -= self._random_kept
            self._random_kept = 0
        return self._end()

    def _begin(self) -> None:
        """Note from now on what is freed and recomputed."""
        self._bytes_before = self._bytes
        self._for_good = True
        self._moment = Moment()

    def _end(self) -> Moment:
        """Return what was noted."""
        if self._made:
            self._free_passed({})
        self._moment.memo_delta = self._bytes - self._bytes_before
        return self._moment

    def _record(self, op: _Op) -> Moment:
        """Write the operation to the tape: its sources are held from now on."""
        moment = Moment(memo_delta=op.random_bytes)
        self._bytes += op.random_bytes
        for value in op.inputs:
            if value.source is not None and not value.is_held and not self._index.is_resident(value.storage):
                value.is_held = True
                moment.acquired.append(value.storage)
        return moment

    def _exit(self, region: int) -> Moment:
        """End a region: what writing down its operations took is counted here. The last one's end seals the tape."""
        moment, profile = Moment(), self._profile
        if region == self._last_region:
            self._begin()
            self._give_back(self._released or [])
            self._released = None
            moment = self._end()
        mode_ms = profile.mode_ms_per_op * profile.regions[region].op_count
        moment.added = Stretch.of(profile.region_ms_per_call + mode_ms + profile.tape_ms_per_op * self._taped[region])
        return moment

    def _ran(self, op: int) -> None:
        """Note the leaf in which an operation of forward runs, and with it where its values are used."""
        assert self._tree is not None
        region = self._index.region_of_op[op]
        position = op - self._profile.regions[region].first_op
        self._position[region - self._first] = position + 1
        taped = self._ops.get(op)
        if taped is not None:
            leaf = taped.leaf = self._tree.leaf_at(region - self._first, position)
            for value in (*taped.inputs, *taped.outputs):
                value.last_leaf = max(leaf, value.last_leaf)

    def _execute(self, op: _Op, going_on: Pass[_Value], finished: bool) -> None:
        for value in op.written:
            memo = value.memo
            if self._may_overwrite(value, going_on, finished) and memo is not None and value.memo is None:
                self._bytes -= memo
                self._free_memo(value)
        # While a random operation runs again, the generator's present state is put aside beside the recorded one.
        within = op.made_bytes + op.workspace_bytes + op.random_bytes + sum(going_on.memos.values())
        self._moment.spike = max(self._moment.spike, self._bytes + within - self._bytes_before)
        self._moment.added = op.again if self._moment.added is None else self._moment.added.then(op.again)
        self.replayed_ops.append(op.order)
        if self.requests is not None:
            self._free_passed(going_on.memos)
            for value in op.outputs:
                number = id(value) + (value.memo is not None)  # made a second time, for another result
                self._made[number] = value
                self.requests.make(number, value.nbytes)
            self.requests.work(op.workspace_bytes)

    def _free_passed(self, passing: Mapping[_Value, Any]) -> None:
        """Write down that what was made, and neither lasts nor is passed on, is freed."""
        assert self.requests is not None
        for number, value in list(self._made.items()):
            if number == id(value) and (value.memo is not None or value in passing):
                if value.memo is not None:
                    del self._made[number]
                continue
            del self._made[number]
            self.requests.free(number, value.nbytes)

    def _free_memo(self, value: _Value) -> None:
        if self.requests is not None:
            self._made.pop(id(value), None)
            self.requests.free(id(value), value.nbytes)

    def _take(self, value: _Value, made: None, lasts: bool) -> int:
        if lasts:
            self._bytes += value.nbytes
        return value.nbytes

    def _free(self, value: _Value) -> None:
        if value.memo is not None:
            self._bytes -= value.memo
            value.memo = None
            self._free_memo(value)
        if value.is_held and self._for_good:
            value.is_held = False
            self._moment.released.append(value.storage)
        value.source = None

    def _forget(self, op: _Op) -> None:
        op.done = True
        if self._for_good:
            self._bytes -= op.random_bytes
        else:
            self._random_kept += op.random_bytes
