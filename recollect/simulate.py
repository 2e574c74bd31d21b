"""The one oracle of peak memory and step time.

Given a profile and a decision for every region, `simulate` walks the profile's events and does with bytes exactly what
the replay engine does with tensors: which storages live when, what is replayed at which read, what is memoised and when
it is freed.  Nothing else in recollect predicts memory.

Memory is additive over regions: a region's decision changes only what its own slots and its own tape hold, so

    bytes(moment) = baseline + fixed(moment) + sum over regions of conditional(region, decision, moment)

where *fixed* is what lives whatever is decided (natural lifetimes, savings of values that a region did not make or
may not replay) and *conditional* is what `region_curve` returns.  The sum counts a storage twice if two regions hold it
at the same time, so it is an upper bound there; a curve therefore names its holdings (`RegionCurve.holds`), with which
`solve` counts such a storage once.  `simulate` itself counts each storage once.

What it does not see: allocator slack, and memory that an operation takes in other ways than its measured scratch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from recollect.records import Decision, EventKind, KeepSet, Profile


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionFacts:
    """What a region's tape allows, whatever is decided.  Values and operations are global indices."""

    index: int
    own: frozenset[int]
    """Values that the region made."""
    keepable: frozenset[int]
    """Own values that can be held as a replay source: not overwritten later."""
    droppable: frozenset[int]
    """Own values that replay can rebuild."""
    slots: tuple[int, ...]
    """Slots whose value is own and droppable: the only ones that a decision concerns."""

    @property
    def optional(self) -> frozenset[int]:
        """Values that a keep set may name: keepable, and not forced to be held anyway."""
        return self.keepable & self.droppable


class ProfileIndex:
    """Look-ups into a profile that do not depend on any decision; build it once and share it."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.region_of_op = [0] * len(profile.ops)
        for index, region in enumerate(profile.regions):
            for op in range(region.first_op, region.first_op + region.op_count):
                self.region_of_op[op] = index
        self.slots_of_region: list[list[int]] = [[] for _ in profile.regions]
        for slot_index, slot in enumerate(profile.slots):
            self.slots_of_region[slot.region].append(slot_index)
        self.events_of_region: list[list[int]] = [[] for _ in profile.regions]
        for time, event in enumerate(profile.events):
            owner = -1
            if event.kind == EventKind.OP:
                owner = self.region_of_op[event.a]
            elif event.kind in (EventKind.SAVE, EventKind.UNPACK, EventKind.RELEASE):
                owner = profile.slots[event.a].region
            if owner >= 0:
                self.events_of_region[owner].append(time)
        self.facts = tuple(self._facts(index) for index in range(len(profile.regions)))
        self._fixed_slots = {s for f in self.facts for s in self.slots_of_region[f.index]} - {
            s for f in self.facts for s in f.slots
        }
        self.fixed_levels, self.fixed_spikes, self._fixed_intervals = self._fixed()

    def backward_event(self) -> int:
        """When backward begins: the moment at which everything held from forward is held; 0 without backward."""
        kinds = (time for time, event in enumerate(self.profile.events) if event.kind == EventKind.BACKWARD)
        return next(kinds, 0)

    def producer_region(self, value: int) -> int:
        """Index of the region that made a value; -1 if none did."""
        op = self.profile.values[value].op
        return self.region_of_op[op] if op >= 0 else -1

    def is_free(self, value: int) -> bool:
        """Its storage is part of the baseline, so that holding it costs nothing."""
        return self.is_baseline(self.profile.values[value].storage)

    def is_baseline(self, storage: int) -> bool:
        """It is alive during the whole step, and counted there."""
        return self.profile.storages[storage].component != "activation"

    def nbytes(self, value: int) -> int:
        """Size of the value's storage."""
        return self.profile.storages[self.profile.values[value].storage].nbytes

    def local(self, value: int) -> tuple[int, int]:
        """A value's coordinates in its region: (operation's position, output's index), as keep sets name it."""
        record = self.profile.values[value]
        return record.op - self.profile.regions[self.region_of_op[record.op]].first_op, record.output

    def keep_values(self, region: int, keep: KeepSet) -> frozenset[int]:
        """The values that a keep set names; names that do not exist or are not optional are ignored."""
        return frozenset(value for value in self.facts[region].optional if self.local(value) in keep)

    def needed_ops(self, region: int, keep: KeepSet) -> frozenset[int]:
        """Operations that are replayed at least once when every droppable slot outside `keep` is dropped."""
        facts = self.facts[region]
        held = self.keep_values(region, keep)
        needed: set[int] = set()
        stack = [v for s in facts.slots if (v := self.profile.slots[s].value) not in held]
        while stack:
            value = stack.pop()
            op = self.profile.values[value].op
            if op in needed:
                continue
            needed.add(op)
            stack.extend(
                u for u in self.profile.ops[op].inputs if u in facts.own and u in facts.droppable and u not in held
            )
        return frozenset(needed)

    def _facts(self, index: int) -> RegionFacts:
        profile = self.profile
        region = profile.regions[index]
        ops = range(region.first_op, region.first_op + region.op_count)
        own = frozenset(v for op in ops for v in profile.ops[op].outputs)
        keepable = frozenset(v for v in own if not profile.values[v].overwritten)
        droppable: set[int] = set()
        for op in ops:  # in order, so that inputs are decided before outputs
            record = profile.ops[op]
            if record.keep_reason:
                continue
            if all(
                (u in keepable or u in droppable) if u in own else not profile.values[u].overwritten
                for u in record.inputs
            ):
                droppable.update(record.outputs)
        # A saved value that is overwritten later is what plain autograd would see (or refuse): it must stay.
        slots = tuple(
            s
            for s in self.slots_of_region[index]
            if (v := profile.slots[s].value) in droppable and not profile.values[v].overwritten
        )
        return RegionFacts(index=index, own=own, keepable=keepable, droppable=frozenset(droppable), slots=slots)

    def _fixed(self) -> tuple[list[int], dict[int, int], dict[int, list[tuple[int, int]]]]:
        """Level after each event and spikes of what lives whatever is decided; when each storage lives in it."""
        profile = self.profile
        held: Counter[int] = Counter()
        level = 0
        levels: list[int] = []
        spikes: dict[int, int] = {}
        born: dict[int, int] = {}
        intervals: dict[int, list[tuple[int, int]]] = {}
        for time, event in enumerate(profile.events):
            acquire = release = -1
            if event.kind == EventKind.ALLOC:
                acquire = event.a
            elif event.kind == EventKind.FREE:
                release = event.a
            elif event.kind == EventKind.SAVE and event.a in self._fixed_slots:
                acquire = profile.values[profile.slots[event.a].value].storage
            elif event.kind == EventKind.RELEASE and event.a in self._fixed_slots:
                release = profile.values[profile.slots[event.a].value].storage
            elif event.kind == EventKind.OP:
                spikes[time] = profile.signatures[profile.ops[event.a].signature].scratch_bytes
            elif event.kind == EventKind.OTHER_OP:
                spikes[time] = profile.signatures[event.a].scratch_bytes
            if acquire >= 0 and profile.storages[acquire].component == "activation":
                held[acquire] += 1
                if held[acquire] == 1:
                    level += profile.storages[acquire].nbytes
                    born[acquire] = time
            if release >= 0 and profile.storages[release].component == "activation":
                held[release] -= 1
                if held[release] == 0:
                    level -= profile.storages[release].nbytes
                    intervals.setdefault(release, []).append((born[release], time))
            levels.append(level)
        for storage, count in held.items():
            if count > 0:
                intervals.setdefault(storage, []).append((born[storage], len(profile.events)))
        return levels, spikes, intervals

    def fixed_at(self, storage: int, time: int) -> bool:
        """Whether a storage is alive after event `time` whatever is decided."""
        return any(start <= time < end for start, end in self._fixed_intervals.get(storage, ()))

    def fixed_deaths(self, storage: int) -> Iterator[int]:
        """Events at which a storage would die if no decision held it."""
        return (end for _, end in self._fixed_intervals.get(storage, ()))

    def fixed_births(self, storage: int) -> Iterator[int]:
        """Events at which a storage comes alive whatever is decided."""
        return (start for start, _ in self._fixed_intervals.get(storage, ()))


@dataclass(slots=True)
class _Moment:
    """What one event does to one region: storages acquired and let go, a spike, a lasting change of memoised bytes."""

    acquired: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    memo_delta: int = 0
    spike: int = 0
    """Highest memoised level within the event, above the level before it."""


class _RegionMachine:
    """The replay engine's bookkeeping for one region, in bytes.  Mirrors `recollect.replay`; see there for why."""

    def __init__(self, index: ProfileIndex, region: int, decision: Decision) -> None:
        self._index = index
        profile = self._profile = index.profile
        facts = self._facts = index.facts[region]
        self.replayed_ops: list[int] = []
        self._memo: dict[int, int] = {}  # value -> bytes
        self._memo_total = 0
        self._refs: Counter[int] = Counter()
        self._held: frozenset[int] = frozenset()
        self._needed: frozenset[int] = frozenset()
        self._dropped: frozenset[int] = frozenset()
        self._sources: set[int] = set()
        self._done: set[int] = set()
        if decision is not None:
            self._held = index.keep_values(region, decision)
            self._needed = index.needed_ops(region, decision)
            self._dropped = frozenset(s for s in facts.slots if profile.slots[s].value not in self._held)
            for slot in self._dropped:
                self._refs[profile.slots[slot].value] += 1
            for op in self._needed:
                for value in set(profile.ops[op].inputs):
                    self._refs[value] += 1

    def is_source(self, value: int) -> bool:
        """The tape reads this value instead of rebuilding it."""
        return value not in self._facts.own or value in self._held or value not in self._facts.droppable

    def handle(self, kind: EventKind, a: int) -> _Moment:
        moment = _Moment()
        profile = self._profile
        if kind == EventKind.OP:
            if a in self._needed:
                for value in profile.ops[a].inputs:
                    if value not in self._sources and self.is_source(value) and not self._index.is_free(value):
                        self._sources.add(value)
                        moment.acquired.append(profile.values[value].storage)
            return moment
        value = profile.slots[a].value
        if a not in self._dropped:
            if a in self._facts.slots:
                if kind == EventKind.SAVE:
                    moment.acquired.append(profile.values[value].storage)
                elif kind == EventKind.RELEASE:
                    moment.released.append(profile.values[value].storage)
            return moment
        before = self._memo_total
        if kind == EventKind.UNPACK:
            self._need(value, moment, before)
        elif kind == EventKind.RELEASE:
            self._unref(value, moment)
        moment.memo_delta = self._memo_total - before
        return moment

    def _available(self, value: int) -> bool:
        return value in self._memo or self.is_source(value)

    def _need(self, value: int, moment: _Moment, before: int) -> None:
        if self._available(value):
            return
        todo: set[int] = set()
        stack = [value]
        while stack:
            u = stack.pop()
            op = self._profile.values[u].op
            if self._available(u) or op in todo:
                continue
            todo.add(op)
            stack.extend(self._profile.ops[op].inputs)
        for op in sorted(todo):
            self._run(op, moment, before)

    def _run(self, op: int, moment: _Moment, before: int) -> None:
        profile, index = self._profile, self._index
        record = profile.ops[op]
        for value in record.mutates:
            if value in self._memo and self._refs[value] == 1:  # only this operation wants it: write in place
                self._memo_total -= self._memo.pop(value)
                self._refs[value] -= 1
        new = {value: index.nbytes(value) for value in record.outputs}
        self._memo_total += sum(new.values())
        scratch = profile.signatures[record.signature].scratch_bytes
        moment.spike = max(moment.spike, self._memo_total + scratch - before)
        self._memo.update(new)
        self._done.add(op)
        self.replayed_ops.append(op)
        for value in record.outputs:
            if self._refs[value] == 0 or self.is_source(value):  # a held sibling is not held twice
                self._memo_total -= self._memo.pop(value)
        for value in set(record.inputs):
            if self._refs[value] > 0:
                self._unref(value, moment)

    def _unref(self, value: int, moment: _Moment) -> None:
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
                op in self._needed
                and op not in self._done
                and all(self._refs[o] == 0 for o in self._profile.ops[op].outputs)
            ):
                self._done.add(op)  # nobody wants its results any more
                stack.extend(set(self._profile.ops[op].inputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionCurve:
    """What one decision for one region adds to memory and time, beyond what is fixed."""

    deltas: tuple[tuple[int, int], ...]
    """(event, bytes): the level changes by so much at that event and stays; sorted by event."""
    spikes: tuple[tuple[int, int], ...]
    """(event, bytes): within that event the level is so much above the level *before* the event, for an instant."""
    holds: tuple[tuple[int, int, int], ...]
    """(storage, first event, event after the last): the part of the deltas that is a storage held beyond its fixed
    life. Another region may hold the same storage at the same time; in memory it is there once."""
    replayed_ops: tuple[int, ...]
    """Operations replayed, in the order of replay."""
    replay_ms: float
    """Time of the replayed operations."""
    overhead_ms: float
    """Replay and the tape's own cost: what the decision adds to the step."""


def _overhead_ms(profile: Profile, region: int, replayed: Sequence[int], needed: int) -> tuple[float, float]:
    replay_ms = sum(profile.signatures[profile.ops[op].signature].ms for op in replayed)
    if needed == 0:
        return replay_ms, 0.0
    mode_ms = profile.mode_ms_per_op * profile.regions[region].op_count
    return replay_ms, profile.accumulation_steps * (replay_ms + mode_ms + profile.tape_ms_per_op * needed)


def region_curve(index: ProfileIndex, region: int, decision: Decision) -> RegionCurve:
    """The memory and time that `decision` adds for `region`, beyond what is fixed (see the module's docstring)."""
    machine = _RegionMachine(index, region, decision)
    profile = index.profile
    deltas: Counter[int] = Counter()
    spikes: list[tuple[int, int]] = []
    held: Counter[int] = Counter()

    def change(time: int, storage: int, sign: int) -> None:
        deltas[time] += sign * profile.storages[storage].nbytes

    opened: dict[int, int] = {}
    intervals: list[tuple[int, int, int]] = []
    for time in index.events_of_region[region]:
        event = profile.events[time]
        moment = machine.handle(event.kind, event.a)
        for storage in moment.acquired:
            held[storage] += 1
            if held[storage] == 1:
                opened[storage] = time
        for storage in moment.released:
            held[storage] -= 1
            if held[storage] == 0:
                intervals.append((storage, opened.pop(storage), time))
        deltas[time] += moment.memo_delta
        # As high as the level after the event, and higher than it if a source is let go within the event.
        if moment.spike > moment.memo_delta or (moment.spike > 0 and moment.released):
            spikes.append((time, moment.spike))
    intervals.extend((storage, start, len(profile.events)) for storage, start in opened.items())
    holds: list[tuple[int, int, int]] = []
    for storage, start, end in intervals:  # only the part in which nothing else keeps the storage alive
        inside = sorted(
            {start, end}
            | {t for t in index.fixed_births(storage) if start < t < end}
            | {t for t in index.fixed_deaths(storage) if start < t < end}
        )
        for a, b in pairwise(inside):
            if not index.fixed_at(storage, a) and not index.is_baseline(storage):
                holds.append((storage, a, b))
                change(a, storage, +1)
                if b < len(profile.events):
                    change(b, storage, -1)
    replay_ms, overhead_ms = _overhead_ms(profile, region, machine.replayed_ops, len(machine._needed))
    return RegionCurve(
        deltas=tuple(sorted((t, d) for t, d in deltas.items() if d)),
        spikes=tuple(spikes),
        holds=tuple(sorted(holds)),
        replayed_ops=tuple(machine.replayed_ops),
        replay_ms=replay_ms,
        overhead_ms=overhead_ms,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """The predicted step."""

    peak_bytes: int
    """In the budget's terms: baseline, corrections and margin included."""
    peak_event: int
    """Index into `Profile.events`."""
    peak_where: str
    """For people: a region's key, ``backward of KEY``, ``backward`` or ``optimizer step``."""
    breakdown: dict[str, int]
    """Bytes at the peak by component; they add up to `peak_bytes`."""
    step_ms: float
    replay_ms: float
    replayed_ops: tuple[int, ...]
    """Forward operations replayed, in order of regions."""


def fixed_peaks(index: ProfileIndex) -> list[int]:
    """For each event: highest bytes within it of what is fixed, baseline, correction and margin included."""
    profile = index.profile
    offset = profile.baseline_bytes + profile.correction_bytes + profile.margin_bytes
    return [offset + level + index.fixed_spikes.get(time, 0) for time, level in enumerate(index.fixed_levels)]


def simulate(index: ProfileIndex, decisions: Sequence[Decision]) -> Simulation:
    """Walk the step with one decision per region (`None`: untouched).

    A storage held by several regions is counted once, so the peak is never above what the sum of `region_curve`s says.
    """
    profile = index.profile
    machines = [_RegionMachine(index, region, decision) for region, decision in enumerate(decisions)]
    held: Counter[int] = Counter()
    level = memo = 0
    peak = peak_memo = peak_scratch = -1
    peak_event = 0
    current = -1
    where_region = -1
    phase = "forward"
    peak_label = ""
    components_at_peak: dict[str, int] = {}
    offset = profile.baseline_bytes + profile.correction_bytes + profile.margin_bytes
    scratch_kinds = (EventKind.OP, EventKind.OTHER_OP)
    for time, event in enumerate(profile.events):
        acquired: list[int] = []
        released: list[int] = []
        spike = 0
        memo_before = memo
        level_before = level
        kind, a = event
        if kind == EventKind.ALLOC:
            acquired.append(a)
        elif kind == EventKind.FREE:
            released.append(a)
        elif kind == EventKind.ENTER:
            current = a
        elif kind == EventKind.EXIT:
            current = -1
        elif kind == EventKind.BACKWARD:
            phase = "backward"
        elif kind == EventKind.OPTIMIZER:
            phase = "optimizer"
        elif kind != EventKind.OTHER_OP:
            owner = index.region_of_op[a] if kind == EventKind.OP else profile.slots[a].region
            if phase == "backward":
                where_region = owner
            if kind in (EventKind.SAVE, EventKind.RELEASE) and a in index._fixed_slots:
                storage = profile.values[profile.slots[a].value].storage
                (acquired if kind == EventKind.SAVE else released).append(storage)
            moment = machines[owner].handle(kind, a)
            acquired += moment.acquired
            released += moment.released
            memo += moment.memo_delta
            spike = moment.spike
        for storage in acquired:
            if profile.storages[storage].component == "activation":
                held[storage] += 1
                if held[storage] == 1:
                    level += profile.storages[storage].nbytes
        for storage in released:
            if profile.storages[storage].component == "activation":
                held[storage] -= 1
                if held[storage] == 0:
                    level -= profile.storages[storage].nbytes
        scratch = index.fixed_spikes.get(time, 0) if kind in scratch_kinds else 0
        high = max(level + memo + scratch, level_before + memo_before + spike)
        if high > peak:
            peak, peak_event = high, time
            in_replay = level_before + memo_before + spike >= level + memo + scratch and spike > 0
            peak_memo = memo_before + spike if in_replay else memo
            peak_scratch = 0 if in_replay else scratch
            components_at_peak = {"activations": high - peak_memo - peak_scratch}
            if phase == "optimizer":
                peak_label = "optimizer step"
            elif phase == "backward":
                peak_label = f"backward of {profile.regions[where_region].key}" if where_region >= 0 else "backward"
            else:
                peak_label = profile.regions[current].key if current >= 0 else "forward"
    if peak < 0:
        peak = 0
        components_at_peak = {"activations": 0}
        peak_memo = peak_scratch = 0
    step_ms = profile.plain_step_ms
    replay_total = 0.0
    replayed: list[int] = []
    for region, machine in enumerate(machines):
        replay_ms, overhead_ms = _overhead_ms(profile, region, machine.replayed_ops, len(machine._needed))
        replay_total += replay_ms
        step_ms += overhead_ms
        replayed += machine.replayed_ops
    breakdown = {
        **profile.baseline,
        "activations": components_at_peak["activations"],
        "replay": peak_memo,
        "operation_scratch": peak_scratch,
        "correction": profile.correction_bytes + profile.margin_bytes,
    }
    return Simulation(
        peak_bytes=peak + offset,
        peak_event=peak_event,
        peak_where=peak_label or "parameters and optimizer state",
        breakdown=breakdown,
        step_ms=step_ms,
        replay_ms=replay_total,
        replayed_ops=tuple(replayed),
    )
