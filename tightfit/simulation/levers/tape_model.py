"""What one tape holds, in bytes: the schedule that the engine's tape follows, counted instead of run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
        self.inputs: Sequence[_Value] = ()
        self.outputs: Sequence[_Value] = ()
        self.written: Sequence[_Value] = ()
        self.demanded = True
        self.done = False
        self.made_bytes = 0
        self.random_bytes = random_bytes
        self.workspace_bytes = workspace_bytes
        self.again = again  # what running it again takes


class _Before:
    """A tape's state before a backward that keeps its graph has used anything up."""

    def __init__(self, held_bytes: int, values: Iterable[_Value], ops: Iterable[_Op]) -> None:
        self.bytes = held_bytes
        self._values = [(value, value.refs, value.source, value.memo) for value in values]
        self._ops = [(op, op.done) for op in ops]

    def put_back(self) -> list[_Value]:
        """Let all be as it was; return the values whose memos are gone with it."""
        gone = []
        for value, refs, source, memo in self._values:
            if value.memo is not None and memo is None:
                gone.append(value)
            value.refs, value.source, value.memo = refs, source, memo
        for op, done in self._ops:
            op.done = done
        return gone


class TapeModel(Schedule[_Value, _Op]):
    """One tape: that of one region, or of several that follow each other (`decisions` has one for each)."""

    def __init__(
        self,
        index: ProfileIndex,
        first: int,
        decisions: Sequence[Decision | None],
        tree: RecomputeTree | None = None,
        backward: int = 0,
    ) -> None:
        """Begin a tape; `backward`: the copy for what that backward inside forward has saved again."""
        self._ops: dict[int, _Op] = {}
        self._index = index
        profile = self._profile = index.profile
        self._backward_of_op, self._backward_of_slot = index.backward_of_op, index.backward_of_slot
        self._first = first
        self.tree = tree if tree is not None and tree.cuts else None
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
        self._keeping = 0  # backwards that run and keep their graphs
        self._read: set[int] = set()  # slots that such a backward was done with
        self._before: _Before | None = None  # the tape before such a backward used it up
        self._is_copy = backward > 0
        # Values of slots let go while the tape was recording; None when that is over.
        self._released: list[_Value] | None = None if self._is_copy else []
        self._position = [0] * len(decisions)
        self._leaf_of_slot: dict[int, int] = {}
        self._taped: Counter[int] = Counter()  # by region: operations
        self._written_down: set[_Op] = set()  # by a copy
        self._values: dict[int, _Value] = {}
        held = index.kept_values(facts, decisions)
        slots = [slot for slot in facts.slots if index.backward_of_slot[slot] == backward]
        needed = sorted(index.rebuilding_ops(facts, held, slots))
        self._write_down(needed, held | (facts.own - facts.droppable), facts.own)
        self._dropped = {s: self._values[v] for s in slots if (v := profile.slots[s].value) not in held}
        for value in self._dropped.values():
            value.refs += 1
        self._copies: dict[int, TapeModel] = {}  # by backward inside forward
        if not backward:
            for number in sorted({index.backward_of_slot[slot] for slot in facts.slots} - {0}):
                self._copies[number] = TapeModel(index, first, decisions, backward=number)

    def __del__(self) -> None:
        # Values and operations refer to each other. A hundred long tapes, left to the garbage collector, make it look
        # through the whole heap again and again.
        for op in self._ops.values():
            op.inputs = op.outputs = op.written = ()

    def _write_down(self, needed: Sequence[int], kept: frozenset[int], own: frozenset[int]) -> None:
        """Set up the operations that are replayed at least once, and the values that they read and make."""
        profile, values = self._profile, self._values
        storages, records, signatures = profile.storages, profile.values, profile.signatures
        replay_ms = profile.replay_ms_per_op
        again: dict[int, Stretch] = {}  # by signature

        def found(value: int) -> _Value:
            storage = records[value].storage
            is_source = value not in own or value in kept
            known = values[value] = _Value(storage, storages[storage].nbytes, None, is_source)
            return known

        # A long tape is written down for each of a hundred plans: what is asked for each operation is looked up first.
        self._taped.update(map(self._index.region_of_op.__getitem__, needed))
        for op in needed:
            record = profile.ops[op]
            signature = signatures[record.signature]
            takes = again.get(record.signature)
            if takes is None:
                takes = again[record.signature] = Stretch.of(signature.ms + replay_ms, signature.device_ms)
            taped = self._ops[op] = _Op(op, record.random_state_bytes, signature.workspace_bytes, takes)
            inputs: list[_Value] = []
            outputs: list[_Value] = []
            for value in dict.fromkeys(record.inputs):
                read = values.get(value) or found(value)
                read.refs += 1
                inputs.append(read)
            made_bytes = 0
            for value in record.outputs:
                made = values.get(value) or found(value)
                made.op = taped
                made_bytes += made.nbytes
                outputs.append(made)
            taped.inputs, taped.outputs, taped.made_bytes = inputs, outputs, made_bytes
            if record.mutates:
                taped.written = [values[value] for value in record.mutates]

    def handle(self, kind: EventKind, a: int) -> Moment:
        """Return what an event does: OP, SAVE, UNPACK, READ, RELEASE or EXIT of this tape's regions, or KEEPING."""
        if kind == EventKind.OP:
            if backward := self._backward_of_op[a]:
                return self._copies[backward].record(a) if backward in self._copies else NOTHING
            op = self._ops.get(a)
            if self.tree is not None:
                self._ran(a, op)
            return NOTHING if op is None else self._record(op)
        if kind == EventKind.EXIT:
            return self._exit(a) if self._ops or self._copies else NOTHING
        if kind == EventKind.KEEPING:
            return self._keep_graph(a)
        backward = self._backward_of_slot[a]
        if backward and not self._is_copy and a in self.slots:
            copy = self._copies[backward]
            copy.requests = self.requests
            moment = copy.handle(kind, a)
            self.replayed_ops += copy.replayed_ops
            copy.replayed_ops = []
            return moment
        value = self._dropped.get(a)
        if value is None:
            return self._keep(kind, a)
        if kind == EventKind.SAVE:
            return self._save(a, value)
        if kind == EventKind.UNPACK:
            if value.memo is None:
                return self._read_again(a, value)
        elif kind == EventKind.READ:
            if self._before is not None and a not in self._read:
                self._read.add(a)
                self._begin()
                self._give_back([value])
                return self._end()
        elif self._released is not None:
            self._released.append(value)
        else:
            self._begin()
            self._put_back()
            self._give_back([value])
            return self._end()
        return NOTHING

    def _save(self, slot: int, value: _Value) -> Moment:
        """Return what it does that a dropped slot is saved."""
        if self._is_copy:
            return self._hold_sources(value)
        if self.tree is not None:
            region = self._profile.slots[slot].region - self._first
            leaf = self._leaf_of_slot[slot] = self.tree.leaf_at(region, self._position[region])
            value.last_leaf = max(leaf, value.last_leaf)
        return NOTHING

    def _read_again(self, slot: int, value: _Value) -> Moment:
        """Return what it does that a dropped slot is read which is not at hand."""
        self._begin()
        if self._keeping and self._released is None:
            if self._before is not None and value.op is not None and value.op.done:
                self._put_back()  # read, and let go of, before
            if self._before is None:
                self._before = _Before(self._bytes, self._values.values(), self._ops.values())
        self._recompute(value, self._leaf_of_slot.get(slot, 0))
        return self._end()

    def record(self, op: int) -> Moment:
        """Return what it does that the backward for which this is a copy runs an operation."""
        taped = self._ops.get(op)
        if taped is None:
            return NOTHING
        self._written_down.add(taped)
        found = self._record(taped)
        moment = Moment(acquired=list(found.acquired), memo_delta=found.memo_delta)
        for value in taped.inputs:
            moment.acquired += self._hold_sources(value).acquired
        return moment

    def _hold_sources(self, wanted: _Value) -> Moment:
        """Hold what rebuilding a value reads: it is written down for a copy of the tape."""
        moment = Moment()
        stack = [wanted]
        while stack:
            value = stack.pop()
            op = value.op
            if value.source is not None or op is None or op in self._written_down:
                continue
            self._written_down.add(op)
            moment.acquired += self._record(op).acquired
            stack += op.inputs
        return moment

    def _keep_graph(self, begins: int) -> Moment:
        """Return what it does that a backward begins or ends that keeps its graph: what that used up is put back."""
        moment = Moment()
        for tape in (self, *self._copies.values()):
            tape._keeping += 1 if begins else -1
            if not tape._keeping and tape._before is not None:
                tape._begin()
                tape._put_back()
                moment.memo_delta += tape._end().memo_delta
        return moment

    def _put_back(self) -> None:
        """Let the tape be as before the backward that kept its graph."""
        before, self._before = self._before, None
        self._read = set()
        if before is not None:
            for value in before.put_back():
                self._free_memo(value)
            self._bytes = before.bytes

    def _keep(self, kind: EventKind, slot: int) -> Moment:
        """Return what an event does to a slot that is not dropped."""
        if slot in self.slots:
            storage = self._profile.values[self._profile.slots[slot].value].storage
            if kind == EventKind.SAVE:
                return Moment(acquired=[storage])
            if kind == EventKind.RELEASE:
                return Moment(released=[storage])
        return NOTHING

    def _begin(self) -> None:
        """Note from now on what is freed and recomputed."""
        self._bytes_before = self._bytes
        self._moment = Moment()

    def _end(self) -> Moment:
        """Return what was noted."""
        if self._made:
            self._free_passed({})
        self._moment.memo_delta = self._bytes - self._bytes_before
        return self._moment

    def _record(self, op: _Op) -> Moment:
        """Write the operation to the tape: its sources are held from now on."""
        held_bytes = 0 if self._is_copy else op.random_bytes  # a copy has the same random state
        self._bytes += held_bytes
        acquired: list[int] = []
        for value in op.inputs:
            if value.source is not None and not value.is_held and not self._index.is_resident(value.storage):
                value.is_held = True
                acquired.append(value.storage)
        return Moment(acquired=acquired, memo_delta=held_bytes) if acquired or held_bytes else NOTHING

    def _exit(self, region: int) -> Moment:
        """End a region: what writing down its operations took is counted here. The last one's end seals the tape."""
        moment, profile = Moment(), self._profile
        if region == self._last_region:
            self._begin()
            self._give_back(self._released or [])
            self._released = None
            moment = self._end()
        mode_ms = profile.mode_ms_per_op * profile.regions[region].op_count
        taped = self._taped[region] + sum(copy._taped[region] for copy in self._copies.values())
        moment.added = Stretch.of(profile.region_ms_per_call + mode_ms + profile.tape_ms_per_op * taped)
        return moment

    def _ran(self, op: int, taped: _Op | None) -> None:
        """Note the leaf in which an operation of forward runs, and with it where its values are used."""
        assert self.tree is not None
        region = self._index.region_of_op[op]
        position = op - self._profile.regions[region].first_op
        self._position[region - self._first] = position + 1
        if taped is not None:
            leaf = taped.leaf = self.tree.leaf_at(region - self._first, position)
            for values in (taped.inputs, taped.outputs):
                for value in values:
                    if value.last_leaf < leaf:
                        value.last_leaf = leaf

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
        if value.is_held and self._before is None:  # else a further backward needs it
            value.is_held = False
            self._moment.released.append(value.storage)
        value.source = None

    def _forget(self, op: _Op) -> None:
        op.done = True
        if self._before is None and not self._is_copy:
            self._bytes -= op.random_bytes
