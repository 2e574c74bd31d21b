"""Find the best values to keep in one region when bytes at some moments have a price.

The pricing problem of the column generation (Dantzig & Wolfe 1960; Gilmore & Gomory 1961).  Within a region, an
operation is recomputed or not, and a value is available to recomputation or not:

- a dropped value needs its operation recomputed;
- a recomputed operation needs each input available: held, rebuilt, or a source from outside that is then held;
- a value that is available but not rebuilt is held, and pays its bytes' price at each moment from when autograd saves
  it to its release.

Written with the two choices per value, every condition is an implication, so the problem is a lightest closed set
(Picard 1976), solved exactly by one minimum cut, and not the general integer program that rematerialisation needs when
the schedule is free (Checkmate, Jain et al. 2020; Rockmate, Zhao et al. 2023).

The cut leaves out what recomputation holds on its way, and shortens the lives of what it reads, so its optimum is a
*lower bound* on what any decision of the region costs at these prices.  Columns are always evaluated in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tightfit.records import Decision, EventKind, Signature
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.always_held import AlwaysHeld
from tightfit.solver.columns import keeping, useful_values
from tightfit.solver.min_cut import Closure
from tightfit.solver.time_cuts import Cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What a byte costs at the moments that bind, in ms per byte, and how much each way that binds weighs."""

    times: Mapping[Cut, float]
    """What each way weighs, together at most 1; nothing where only the peak is sought."""
    private: dict[int, float]
    """Event to price, for bytes that only one region holds."""
    shared: dict[tuple[int, int, int], float]
    """(event, storage, region) to that region's part of the price of a shared storage's byte."""

    @property
    def time_weight(self) -> float:
        """What a millisecond weighs that all ways take."""
        return sum(self.times.values())

    def host_weight(self, event: int) -> float:
        """Return what a millisecond of the host's weighs within an event of each pass: the later, the less."""
        return sum(weight * cut.counts(event)[0] for cut, weight in self.times.items())

    def device_weight(self, event: int) -> float:
        """Return what a millisecond of the device's weighs within an event of each pass: the later, the more."""
        return sum(weight * cut.counts(event)[1] for cut, weight in self.times.items())


@dataclass(frozen=True, slots=True)
class LeastCosts:
    """What a region's recomputation costs at least at given prices, whenever it happens."""

    region: float
    """Recomputing anything."""
    host: float
    """A millisecond of the host's."""
    device: float
    """A millisecond of the device's."""
    per_op: float
    """Each operation, beside its own time."""

    @classmethod
    def at(cls, index: ProfileIndex, region: int, prices: Prices) -> LeastCosts:
        """Return the costs at these prices: of the host's time as late as may be, of the device's as early."""
        profile = index.profile
        costs = BY_VALUE.costs(profile)
        exit_, first, last = index.recomputing_span(region)
        forward, host, device = prices.host_weight(exit_), prices.host_weight(last), prices.device_weight(first)
        return cls(
            region=forward * (costs.region_ms + costs.region_ms_per_op * profile.regions[region].op_count),
            host=host,
            device=device,
            per_op=forward * costs.tape_ms_per_op + host * costs.replay_ms_per_op,
        )

    def of(self, signature: Signature) -> float:
        """Return what recomputing an operation costs."""
        return self.host * signature.ms + self.device * signature.device_ms + self.per_op


@dataclass(frozen=True, kw_only=True, slots=True)
class _Term:
    """Bytes that are there when something is held."""

    storage: int
    nbytes: int
    start: int
    end: int
    """Event after the last at which it is certainly there."""


@dataclass(slots=True)
class PricingModel:
    """One region's pricing problem, built once; `best` solves it at given prices."""

    index: ProfileIndex
    region: int
    shared: frozenset[int]
    """Storages that other regions may hold too."""
    enabled: bool = field(init=False)
    """False when there is nothing that the region may drop."""
    _ops: list[int] = field(init=False)
    _values: list[int] = field(init=False)
    _saved: dict[int, tuple[int, int, int]] = field(init=False)
    _reads: dict[int, list[int]] = field(init=False)
    _terms: dict[int, _Term] = field(init=False)
    _always: dict[int, _Term] = field(init=False)
    _covered: dict[int, tuple[list[int], list[int]]] = field(init=False)
    _held: AlwaysHeld = field(init=False)

    def __post_init__(self) -> None:
        index, profile = self.index, self.index.profile
        facts = index.facts[self.region]
        self.enabled = bool(facts.slots)
        self._saved = self._saving_times()
        self._values = list(useful_values(index, self.region))
        ops = {profile.values[v].op for v in self._values} | {profile.values[v].op for v in self._saved}
        stack = list(ops)
        while stack:
            for u in profile.ops[stack.pop()].inputs:
                op = profile.values[u].op
                if u in facts.own and u in facts.droppable and op not in ops:
                    ops.add(op)
                    stack.append(op)
        self._ops = sorted(ops)
        self._reads = {op: sorted(set(profile.ops[op].inputs)) for op in self._ops}
        self._terms = {}
        self._always = {}
        self._covered = {}
        starts, ends = self._reading_times()
        for value in {u for reads in self._reads.values() for u in reads} | set(self._values):
            if index.is_free(value) or (value in facts.droppable and value not in facts.optional):
                continue
            if value in self._saved:
                start, unpacked, released = self._saved[value]
                self._terms[value] = self._term(value, start, unpacked)
                self._always[value] = self._term(value, unpacked, released)
            elif value in starts and starts[value] < ends[value]:
                self._terms[value] = self._term(value, starts[value], ends[value])

        counted = {term.storage for terms in (self._terms, self._always) for term in terms.values()}
        self._held = AlwaysHeld(index, self.region, counted)

    def _term(self, value: int, start: int, end: int) -> _Term:
        storage = self.index.profile.values[value].storage
        return _Term(storage=storage, nbytes=self.index.nbytes(value), start=start, end=end)

    def _saving_times(self) -> dict[int, tuple[int, int, int]]:
        """Return, for each saved droppable value: when it is saved first, read first, and released first.

        What backwards inside forward read, and what they save again, does not count, which leaves a lower bound.
        """
        profile, index = self.index.profile, self.index
        never = len(profile.events)
        slots = {slot for slot in index.facts[self.region].slots if not index.is_saved_again(slot)}
        times: dict[int, dict[EventKind, int]] = {}
        for time in self.index.events_of_region[self.region]:
            kind, a = profile.events[time]
            reads_again = kind == EventKind.UNPACK and index.is_keeping(time) and time < index.backward_event()
            if kind not in (EventKind.OP, EventKind.EXIT, EventKind.KEEPING) and not reads_again and a in slots:
                times.setdefault(profile.slots[a].value, {}).setdefault(kind, time)
        result = {}
        for value, found in times.items():
            if EventKind.SAVE in found:
                released = found.get(EventKind.RELEASE, never)
                unpacked = min(found.get(EventKind.UNPACK, released), released)
                result[value] = (found[EventKind.SAVE], unpacked, released)
        return result

    def _reading_times(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return, for each value that recomputation reads, the span in which it is held whoever reads it."""
        profile = self.index.profile
        never = len(profile.events)
        ran = {
            profile.events[time].a: time
            for time in self.index.events_of_region[self.region]
            if profile.events[time].kind == EventKind.OP
        }
        # Operation -> earliest event at which replay may be through with it: when something made from it is first read.
        through = dict.fromkeys(self._ops, never)
        for op in reversed(self._ops):
            for value in profile.ops[op].outputs:
                if value in self._saved:
                    through[op] = min(through[op], self._saved[value][1])
            for value in self._reads[op]:
                maker = profile.values[value].op
                if maker in through:
                    through[maker] = min(through[maker], through[op])
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        for op in self._ops:
            for value in self._reads[op]:
                starts[value] = max(starts.get(value, 0), ran.get(op, never))
                ends[value] = min(ends.get(value, never), through[op])
        return starts, ends

    def _cover(self, time: int) -> tuple[list[int], list[int]]:
        """Return the values whose bytes at `time` depend on the decision, and those whose bytes are there anyway."""
        found = self._covered.get(time)
        if found is None:
            there = [
                [v for v, t in terms.items() if t.start <= time < t.end and not self.index.fixed_at(t.storage, time)]
                for terms in (self._terms, self._always)
            ]
            found = self._covered[time] = (there[0], there[1])
        return found

    def best(self, prices: Prices) -> tuple[float, Decision | None]:
        """Return a lower bound on the cost of every choice of values, and the decision that attains it in the model."""
        if not self.enabled:
            return 0.0, None
        index, profile = self.index, self.index.profile
        facts = index.facts[self.region]
        price_of: dict[int, float] = {}
        constant = self._held.cost(self.region, prices.private, prices.shared, self.shared)
        for time, price in prices.private.items():
            chosen, always = self._cover(time)
            for value in chosen:
                price_of[value] = price_of.get(value, 0.0) + self._price(value, time, price, prices)
            for value in always:
                constant += self._price(value, time, price, prices)
        graph = Closure()
        costs = LeastCosts.at(index, self.region, prices)
        mode = graph.node(costs.region)
        replayed = {}
        for op in self._ops:
            replayed[op] = graph.node(costs.of(profile.signatures[profile.ops[op].signature]))
            graph.require(replayed[op], mode)
        available: dict[int, int] = {}
        for value in self._values:
            price = price_of.get(value, 0.0)
            op = replayed[profile.values[value].op]
            graph.weights[op] -= price  # a value that is rebuilt is not held
            if value in self._saved:
                constant += price
            else:
                available[value] = graph.node(price)
                graph.require(op, available[value])
        for op, reads in self._reads.items():
            for value in reads:
                if value in facts.own and value in facts.droppable and value not in facts.optional:
                    graph.require(replayed[op], replayed[profile.values[value].op])
                elif value in available:
                    graph.require(replayed[op], available[value])
                elif value not in self._saved and not index.is_free(value) and price_of.get(value, 0.0) > 0:
                    available[value] = graph.node(price_of[value])
                    graph.require(replayed[op], available[value])
        weight, taken = graph.lightest()
        if not any(taken[node] for node in replayed.values()):
            return constant + min(weight, 0.0), None
        kept = [
            value
            for value in self._values
            if not taken[replayed[profile.values[value].op]] and (value in self._saved or taken[available[value]])
        ]
        return constant + weight, keeping(index, kept)

    def _price(self, value: int, time: int, price: float, prices: Prices) -> float:
        storage = self.index.profile.values[value].storage
        if storage in self.shared:
            price = prices.shared.get((time, storage, self.region), 0.0)
        return price * self.index.nbytes(value)
