"""What one region's tape holds under many decisions, found quickly: the schedule, played with numbers.

The solver evaluates thousands of decisions for one region.  All that does not depend on the decision is written down
once (`TapeScript`): which events matter, what each operation reads, makes and holds.  Playing it does what `TapeModel`
does, in the same order, without an object for each value and operation.  Only the plain case is written down: one
region, no tree, no backward inside forward or that keeps its graph; for everything else there is the model.  That both
say the same is tested on random steps (`tests/simulation/test_tape_script.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum
from typing import NamedTuple
from weakref import WeakKeyDictionary

from tightfit.records import EventKind, Stretch, ValueName
from tightfit.simulation.levers.lever import Happening, Moment
from tightfit.simulation.profile_index import ProfileIndex


class _Kind(IntEnum):
    RUN, SAVE, READ, RELEASE, END = range(5)


class _Op(NamedTuple):
    """An operation that some decision recomputes; values are numbered within the script."""

    order: int
    """Its place in the profile."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    written: tuple[int, ...]
    random_bytes: int
    within_bytes: int
    """What it holds beside all memos while it runs again."""
    again: Stretch


class TapeScript:
    """One region, written down for playing; `script_of` keeps it."""

    def __init__(self, index: ProfileIndex, region: int) -> None:
        profile, facts = index.profile, index.facts[region]
        record = profile.regions[region]
        numbers: dict[int, int] = {}

        def number(value: int) -> int:
            return numbers.setdefault(value, len(numbers))

        self._ops: list[_Op] = []
        places: dict[int, int] = {}
        for op in sorted(index.rebuilding_ops(facts, frozenset())):
            entry, signature = profile.ops[op], profile.signatures[profile.ops[op].signature]
            places[op] = len(self._ops)
            made_bytes = sum(index.nbytes(value) for value in entry.outputs)
            random_bytes = entry.random_state_bytes
            self._ops.append(
                _Op(
                    order=op,
                    inputs=tuple(number(value) for value in dict.fromkeys(entry.inputs)),
                    outputs=tuple(number(value) for value in entry.outputs),
                    written=tuple(number(value) for value in entry.mutates),
                    random_bytes=random_bytes,
                    # The generator's present state is put aside beside the recorded one.
                    within_bytes=made_bytes + signature.workspace_bytes + random_bytes,
                    again=Stretch.of(signature.ms + profile.replay_ms_per_op, signature.device_ms),
                )
            )
        self._dropped_slots: list[int] = []  # value of each
        self._events: list[tuple[int, _Kind, int]] = []
        kinds = {
            EventKind.SAVE: _Kind.SAVE,
            EventKind.UNPACK: _Kind.READ,
            EventKind.RELEASE: _Kind.RELEASE,
        }
        slots = frozenset(facts.slots)
        self._dropped_slots = [number(profile.slots[slot].value) for slot in facts.slots]
        for time in index.events_of_region[region]:
            kind, a = profile.events[time]
            if kind == EventKind.OP:
                if a in places:
                    self._events.append((time, _Kind.RUN, places[a]))
            elif kind == EventKind.EXIT:
                self._events.append((time, _Kind.END, 0))
            elif kind in kinds and a in slots:
                self._events.append((time, kinds[kind], number(profile.slots[a].value)))
        self._nbytes = [index.nbytes(value) for value in numbers]
        self._storages = [profile.values[value].storage for value in numbers]
        self._resident = [index.is_free(value) for value in numbers]
        self._makers = [places.get(profile.values[value].op, -1) for value in numbers]
        self._always_there = [value not in facts.own or value not in facts.droppable for value in numbers]
        self._optional = {name: numbers[value] for value, _, name in facts.names if value in numbers}
        self._region_ms = profile.region_ms_per_call + profile.mode_ms_per_op * record.op_count
        self._tape_ms_per_op = profile.tape_ms_per_op

    def play(self, kept: Collection[ValueName]) -> tuple[list[Happening], list[int]]:
        """Return what happens where these values are kept, and the operations that are recomputed, in that order."""
        ops, makers, nbytes, storages = self._ops, self._makers, self._nbytes, self._storages
        source = self._always_there.copy()
        for name in kept:
            value = self._optional.get(name)
            if value is not None:
                source[value] = True
        dropped = [not there for there in source]
        needed = self._needed(dropped)
        refs = [0] * len(source)
        for place, op in enumerate(ops):
            if needed[place]:
                for value in op.inputs:
                    refs[value] += 1
        for value in self._dropped_slots:
            if dropped[value]:
                refs[value] += 1
        done = [not one for one in needed]
        memo = [False] * len(source)
        held = self._resident.copy()  # as sources
        released_early: list[int] | None = []
        replayed: list[int] = []
        total = 0  # bytes of memos, and of random states that wait

        def give_back(values: list[int], moment: Moment) -> None:
            nonlocal total
            while values:
                value = values.pop()
                refs[value] -= 1
                if refs[value]:
                    continue
                if memo[value]:
                    total -= nbytes[value]
                    memo[value] = False
                if held[value] and not self._resident[value]:
                    held[value] = False
                    moment.released.append(storages[value])
                source[value] = False
                place = makers[value]
                if place >= 0 and not done[place] and not any(refs[output] for output in ops[place].outputs):
                    values.extend(ops[place].inputs)
                    done[place] = True
                    total -= ops[place].random_bytes

        def recompute(wanted: int, moment: Moment) -> None:
            nonlocal total
            before = total
            todo: set[int] = set()
            stack = [wanted]
            while stack:
                value = stack.pop()
                if not memo[value] and not source[value]:
                    place = makers[value]
                    assert place >= 0, "what a tape may drop can be rebuilt from what it holds"
                    assert not done[place], "what a tape may drop can be rebuilt from what it holds"
                    if place not in todo:
                        todo.add(place)
                        stack.extend(ops[place].inputs)
            host_ms = device_ms = ms = 0.0  # as `Stretch.then`
            for place in sorted(todo):
                op = ops[place]
                for value in op.written:  # its memory is handed over, if only this operation still wants it
                    if memo[value] and refs[value] == 1:
                        memo[value] = False
                        total -= nbytes[value]
                moment.spike = max(moment.spike, total + op.within_bytes - before)
                ms = max(ms + op.again.device_ms, host_ms + op.again.ms)
                host_ms += op.again.host_ms
                device_ms += op.again.device_ms
                replayed.append(op.order)
                for value in op.outputs:
                    if refs[value] and not memo[value] and not source[value]:
                        memo[value] = True
                        total += nbytes[value]
                done[place] = True
                total -= op.random_bytes
                give_back(list(op.inputs), moment)
            moment.added = Stretch(host_ms, device_ms, ms)
            moment.memo_delta = total - before

        found: list[Happening] = []
        for time, kind, a in self._events:
            if kind is _Kind.RUN:
                if not needed[a]:
                    continue
                moment = Moment(memo_delta=ops[a].random_bytes)
                total += ops[a].random_bytes
                for value in ops[a].inputs:
                    if source[value] and not held[value]:
                        held[value] = True
                        moment.acquired.append(storages[value])
                if moment.acquired or moment.memo_delta:
                    found.append((time, moment))
            elif kind is _Kind.END:
                moment = Moment()
                before = total
                give_back(released_early or [], moment)
                released_early = None
                moment.memo_delta = total - before
                taped = sum(needed)
                if taped:
                    moment.added = Stretch.of(self._region_ms + self._tape_ms_per_op * taped)
                    found.append((time, moment))
            elif not dropped[a]:
                if kind is _Kind.SAVE:
                    found.append((time, Moment(acquired=[storages[a]])))
                elif kind is _Kind.RELEASE:
                    found.append((time, Moment(released=[storages[a]])))
            elif kind is _Kind.READ:
                if not memo[a]:
                    moment = Moment()
                    recompute(a, moment)
                    found.append((time, moment))
            elif kind is _Kind.RELEASE:
                if released_early is not None:
                    released_early.append(a)
                    continue
                moment = Moment()
                before = total
                give_back([a], moment)
                moment.memo_delta = total - before
                found.append((time, moment))
        return found, replayed

    def _needed(self, dropped: list[bool]) -> list[bool]:
        """Return which operations are recomputed at least once, by place, where these values are dropped."""
        needed = [False] * len(self._ops)
        stack = [value for value in self._dropped_slots if dropped[value]]
        while stack:
            place = self._makers[stack.pop()]
            if place >= 0 and not needed[place]:
                needed[place] = True
                stack.extend([value for value in self._ops[place].inputs if dropped[value]])
        return needed


_scripts: WeakKeyDictionary[ProfileIndex, dict[int, TapeScript | None]] = WeakKeyDictionary()


def script_of(index: ProfileIndex, region: int) -> TapeScript | None:
    """Return a region's script, written down once for an index; None for what only the model plays."""
    known = _scripts.setdefault(index, {})
    if region not in known:
        known[region] = TapeScript(index, region) if _is_plain(index, region) else None
    return known[region]


def _is_plain(index: ProfileIndex, region: int) -> bool:
    """Tell whether no backward keeps its graph or runs inside forward, and no value is in a slot that tapes leave."""
    facts, record = index.facts[region], index.profile.regions[region]
    ops = range(record.first_op, record.first_op + record.op_count)
    inside = any(index.backward_of_slot[slot] for slot in facts.slots) or any(index.backward_of_op[op] for op in ops)
    return not (index.has_keeping or facts.only_again or inside)
