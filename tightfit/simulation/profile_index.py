"""Look up what a profile says whatever is decided: what each region may drop, and what lives in any case.

`simulate` walks a step with these look-ups.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tightfit.collector import uncollected
from tightfit.records import Decision, Event, EventKind, Profile, StepWork, ValueName
from tightfit.simulation.second_call import made_storages, slots_made_again
from tightfit.simulation.walked_events import WalkedEvent, walked_events

_OF_SLOTS = (EventKind.SAVE, EventKind.UNPACK, EventKind.READ, EventKind.RELEASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionFacts:
    """What a tape over a region (or over several that follow each other) allows, whatever is decided.  Values and
    operations are global indices.
    """

    index: int
    """The region; the first, if there are several."""
    own: frozenset[int]
    """Values that the tape's operations made."""
    keepable: frozenset[int]
    """Own values that can be held as a replay source: not overwritten later."""
    droppable: frozenset[int]
    """Own values that replay can rebuild."""
    slots: tuple[int, ...]
    """Slots whose value is own and droppable: the only ones that a decision concerns."""
    optional: frozenset[int]
    """Values that a decision may keep: keepable, and not forced to be held anyway."""
    names: tuple[tuple[int, int, ValueName], ...]
    """Of each optional value: itself, its region's place among the tape's, and its name there."""
    only_again: frozenset[int] = frozenset()
    """Further slots, which no tape can rebuild, but a second call of the region's module."""
    again: frozenset[int] = frozenset()
    """All slots that a second call rebuilds; empty where none may be made."""


class ProfileIndex:
    """Look-ups into a profile that do not depend on any decision; build it once and share it."""

    @uncollected()
    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.region_of_op = [0] * len(profile.ops)
        for index, region in enumerate(profile.regions):
            for op in range(region.first_op, region.first_op + region.op_count):
                self.region_of_op[op] = index
        self.region_of_slot = [slot.region for slot in profile.slots]
        self.saves = Counter(slot.value for slot in profile.slots)
        """How often autograd saves each value."""
        self.activation_bytes = [s.nbytes if s.component == "activation" else 0 for s in profile.storages]
        """Of each storage: its size; nothing for one that is resident, and counted there."""
        self.slots_of_region: list[list[int]] = [[] for _ in profile.regions]
        for slot_index, region_index in enumerate(self.region_of_slot):
            self.slots_of_region[region_index].append(slot_index)
        self.events_of_region: list[list[int]] = [[] for _ in profile.regions]
        kinds = [event.kind for event in profile.events]
        self._backward_event = kinds.index(EventKind.BACKWARD) if EventKind.BACKWARD in kinds else 0
        self._entered = [0] * len(profile.regions)
        self._exited = [0] * len(profile.regions)
        for time, event in enumerate(profile.events):
            if event.kind == EventKind.ENTER:
                self._entered[event.a] = time
            elif event.kind == EventKind.EXIT:
                self._exited[event.a] = time
            owner = self.owner(event)
            if owner >= 0:
                self.events_of_region[owner].append(time)
        self._values_of_storage: list[list[int]] = [[] for _ in profile.storages]
        for number, value in enumerate(profile.values):
            self._values_of_storage[value.storage].append(number)
        self.backward_of_slot = [0] * len(profile.slots)
        """By slot: which backward inside forward that keeps its graph saved it, 1, 2, ...; 0: forward did."""
        self.backward_of_op = [0] * len(profile.ops)
        """The same by operation: which one ran it."""
        self._keeping = self._number_backwards()
        if self.has_keeping:
            keeping = [time for time, event in enumerate(profile.events) if event.kind == EventKind.KEEPING]
            self.events_of_region = [sorted([*times, *keeping]) for times in self.events_of_region]
        self.facts = tuple(self._region_facts(index) for index in range(len(profile.regions)))
        self._spans: dict[int, tuple[int, int, int]] = {}
        self._tape_facts: dict[tuple[int, int], RegionFacts] = {}
        self.fixed_slots = frozenset(range(len(profile.slots))) - {
            s for f in self.facts for s in (*f.slots, *f.only_again)
        }
        """Slots that no decision for a single region concerns."""
        self.fixed_levels, self.fixed_spikes, self._fixed_intervals = self._fixed()

    def repriced(self, profile: Profile) -> ProfileIndex:
        """Return look-ups into a profile that differs from this one's in nothing but times."""
        other = copy.copy(self)
        other.profile = profile
        for name in ("plain_step_ms", "plain_work", "planned_work", "has_device_times"):
            other.__dict__.pop(name, None)
        return other

    @cached_property
    def walked_events(self) -> Sequence[WalkedEvent]:
        """The step's events, with those summed up that are the same under every plan."""
        return walked_events(self.profile, self.region_of_op, self.fixed_slots)

    @cached_property
    def plain_step_ms(self) -> float:
        """Predicted time of the plain step."""
        return self.profile.plain_step_ms

    @cached_property
    def plain_work(self) -> StepWork:
        """What the plain step does within each event."""
        return self.profile.plain_work()

    @cached_property
    def planned_work(self) -> StepWork:
        """The same under a plan that leaves all untouched, as long as it drops anything elsewhere."""
        host_ms, device_ms, optimizer = self.plain_work
        profile, host_ms = self.profile, list(host_ms)
        for time, (kind, _) in enumerate(profile.events):
            if kind == EventKind.EXIT:
                host_ms[time] += profile.untouched_ms_per_region
        begin = next((time for time, (kind, _) in enumerate(profile.events) if kind == EventKind.ENTER), None)
        if begin is not None:
            host_ms[begin] += profile.planned_ms_per_step
        return StepWork(host_ms, device_ms, optimizer)

    def work_under(self, decisions: Sequence[Decision | None]) -> StepWork:
        """Return what a step does within each event beside what the decisions add: the plain step's if all are None."""
        return self.plain_work if all(decision is None for decision in decisions) else self.planned_work

    @cached_property
    def keeps_graph(self) -> bool:
        """Whether the step's backwards but the last one keep the graph."""
        return self.profile.keeps_graph

    def is_keeping(self, time: int) -> bool:
        """Return whether a backward runs that keeps its graph."""
        return self._keeping[time]

    @cached_property
    def has_keeping(self) -> bool:
        """Whether any backward keeps its graph."""
        return any(self._keeping)

    @property
    def has_backward_inside(self) -> bool:
        """Whether a backward inside forward keeps its graph."""
        return any(self._keeping[: self._backward_event])

    @cached_property
    def has_device_times(self) -> bool:
        """Whether a device works beside the host."""
        return self.profile.has_device_times

    def is_saved_again(self, slot: int) -> bool:
        """Return whether a backward saved what forward, or another backward, had made."""
        op = self.profile.values[self.profile.slots[slot].value].op
        return self.backward_of_slot[slot] != (self.backward_of_op[op] if op >= 0 else 0)

    def _number_backwards(self) -> list[bool]:
        """Give each backward inside forward its number; return for each event whether one of them runs."""
        keeping: list[bool] = []
        running = count = 0
        for kind, a in self.profile.events:
            if kind == EventKind.KEEPING:
                running += 1 if a else -1
                count += a
            elif kind == EventKind.SAVE and running:
                self.backward_of_slot[a] = count
            elif kind == EventKind.OP and running:
                self.backward_of_op[a] = count
            keeping.append(running > 0)
        return keeping

    def backward_event(self) -> int:
        """Return when backward begins: the moment at which everything held from forward is held; 0 without backward."""
        return self._backward_event

    def owner(self, event: Event) -> int:
        """Return the region that has a part in an event; -1 if none has."""
        kind, a = event
        if kind == EventKind.OP:
            return self.region_of_op[a]
        if kind == EventKind.EXIT:
            return a
        return self.region_of_slot[a] if kind in _OF_SLOTS else -1

    def recomputing_span(self, region: int) -> tuple[int, int, int]:
        """Return when a region ends in forward, and between which events it is recomputed: its droppable slots' first
        read and last.
        """
        found = self._spans.get(region)
        if found is None:
            events, slots = self.profile.events, frozenset(self.facts[region].slots)
            reads = [
                time
                for time in self.events_of_region[region]
                if events[time].kind == EventKind.UNPACK and events[time].a in slots
            ] or [len(events)]
            found = self._spans[region] = self._exited[region], reads[0], reads[-1]
        return found

    def producer_region(self, value: int) -> int:
        """Return the index of the region that made a value; -1 if none did."""
        op = self.profile.values[value].op
        return self.region_of_op[op] if op >= 0 else -1

    def is_free(self, value: int) -> bool:
        """Return whether a value is in resident memory, so that holding it costs nothing."""
        return self.is_resident(self.profile.values[value].storage)

    def is_resident(self, storage: int) -> bool:
        """Return whether a storage is resident: alive during the whole step, and counted there."""
        return self.profile.storages[storage].component != "activation"

    def nbytes(self, value: int) -> int:
        """Return the size of the value's storage."""
        return self.profile.storages[self.profile.values[value].storage].nbytes

    def local(self, value: int) -> tuple[int, int]:
        """Return a value's name in its region: (operation's position, output's index)."""
        record = self.profile.values[value]
        return record.op - self.profile.regions[self.region_of_op[record.op]].first_op, record.output

    def tape_facts(self, first: int, count: int) -> RegionFacts:
        """Return what one tape over `count` regions from `first` allows."""
        if count == 1:
            return self.facts[first]
        found = self._tape_facts.get((first, count))
        if found is None:
            found = self._tape_facts[first, count] = self._facts(first, count)
        return found

    def keep_values(self, region: int, names: Collection[ValueName]) -> frozenset[int]:
        """Return the values of a region with these names; names that do not exist or are not optional are ignored."""
        return frozenset([value for value, _, name in self.facts[region].names if name in names])

    def kept_values(self, facts: RegionFacts, decisions: Sequence[Decision | None]) -> frozenset[int]:
        """Return what is kept on one tape over several regions, with a decision for each (None there: everything)."""
        kept = [None if decision is None else decision.kept for decision in decisions]
        return frozenset(
            [value for value, place, name in facts.names if (names := kept[place]) is None or name in names]
        )

    def events_between(self, region: int) -> Sequence[Event]:
        """Return what happens in forward between a region's begin and its end."""
        return self.profile.events[self._entered[region] : self._exited[region]]

    def needed_ops(self, region: int, kept: Collection[ValueName]) -> frozenset[int]:
        """Return the operations that are recomputed at least once when every droppable value not `kept` is dropped."""
        return self.rebuilding_ops(self.facts[region], self.keep_values(region, kept))

    def rebuilding_ops(
        self, facts: RegionFacts, held: frozenset[int], slots: Collection[int] | None = None
    ) -> frozenset[int]:
        """Return the operations that run again at least once when every droppable slot whose value is not `held` is
        dropped; `slots`: only for these of them.
        """
        needed: set[int] = set()
        stack = [v for s in (facts.slots if slots is None else slots) if (v := self.profile.slots[s].value) not in held]
        while stack:
            value = stack.pop()
            op = self.profile.values[value].op
            if op in needed:
                continue
            needed.add(op)
            stack.extend([u for u in self.profile.ops[op].inputs if u in facts.droppable and u not in held])
        return frozenset(needed)

    def _region_facts(self, index: int) -> RegionFacts:
        profile = self.profile
        facts = self._facts(index, 1)
        if not profile.regions[index].module_recomputable:
            return facts
        again = slots_made_again(
            profile,
            profile.regions[index],
            self.slots_of_region[index],
            made_storages(self.events_between(index)),
            self._values_of_storage,
        )
        return replace(facts, again=again, only_again=again - set(facts.slots)) if again >= set(facts.slots) else facts

    def _facts(self, index: int, count: int) -> RegionFacts:
        profile = self.profile
        last = profile.regions[index + count - 1]
        ops = range(profile.regions[index].first_op, last.first_op + last.op_count)
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
            for region in range(index, index + count)
            for s in self.slots_of_region[region]
            if (v := profile.slots[s].value) in droppable and not profile.values[v].overwritten
        )
        optional = keepable & droppable
        return RegionFacts(
            index=index,
            own=own,
            keepable=keepable,
            droppable=frozenset(droppable),
            slots=slots,
            optional=optional,
            names=tuple((v, self.region_of_op[profile.values[v].op] - index, self.local(v)) for v in sorted(optional)),
        )

    def _fixed(self) -> tuple[list[int], dict[int, int], dict[int, list[tuple[int, int]]]]:
        """Return level after each event and spikes of what lives whatever is decided; when each storage lives in it."""
        profile = self.profile
        nbytes_of = self.activation_bytes
        held = [0] * len(nbytes_of)
        level = 0
        levels: list[int] = []
        spikes: dict[int, int] = {}
        born: dict[int, int] = {}
        intervals: dict[int, list[tuple[int, int]]] = {}
        for time, (kind, a) in enumerate(profile.events):
            acquire = release = -1
            if kind == EventKind.ALLOC:
                acquire = a
            elif kind == EventKind.FREE:
                release = a
            elif kind == EventKind.OTHER_OP:
                spikes[time] = profile.signatures[a].workspace_bytes
            elif kind == EventKind.OP:
                spikes[time] = profile.signatures[profile.ops[a].signature].workspace_bytes
            elif kind == EventKind.SAVE and a in self.fixed_slots:
                acquire = profile.values[profile.slots[a].value].storage
            elif kind == EventKind.RELEASE and a in self.fixed_slots:
                release = profile.values[profile.slots[a].value].storage
            if acquire >= 0:
                held[acquire] += 1
                if held[acquire] == 1:
                    level += nbytes_of[acquire]
                    born[acquire] = time
            elif release >= 0:
                held[release] -= 1
                if held[release] == 0:
                    level -= nbytes_of[release]
                    intervals.setdefault(release, []).append((born[release], time))
            levels.append(level)
        for storage, count in enumerate(held):
            if count > 0:
                intervals.setdefault(storage, []).append((born[storage], len(profile.events)))
        return levels, spikes, intervals

    def fixed_at(self, storage: int, time: int) -> bool:
        """Return whether a storage is alive after event `time` whatever is decided."""
        return any(start <= time < end for start, end in self._fixed_intervals.get(storage, ()))

    def fixed_deaths(self, storage: int) -> Iterator[int]:
        """Return the events at which a storage would die if no decision held it."""
        return (end for _, end in self._fixed_intervals.get(storage, ()))

    def fixed_births(self, storage: int) -> Iterator[int]:
        """Return the events at which a storage comes alive whatever is decided."""
        return (start for start, _ in self._fixed_intervals.get(storage, ()))
