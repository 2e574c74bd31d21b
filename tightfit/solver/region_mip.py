"""Choose the values of one region by an integer program that knows what recomputation holds on its way.

The minimum cut of `pricing` does not see what is memoised while replay goes on.  Here, beside the two choices per
value (kept or not; its operation replayed or not), each operation has for each moment that matters a variable that
says whether it has been replayed by then.  It follows from the choices as the tape's rules do: reading a dropped
value replays what it needs and does not find, once; a rebuilt value stays until its last reader has run and autograd
has let go of it; sources stay until all that reads them has run.  Levels *after* each event are exact; what rises
within an event (an operation's workspace, values that pass through) is left out, so at prices the optimum is a lower
bound on the cost of every decision.

The model is Checkmate's (Jain et al. 2020) for the schedules that lazy replay at one level can have: when an
operation runs again is not free but a consequence, which leaves one binary for each value and few moments to look at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tightfit.records import Decision, EventKind
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.columns import keeping
from tightfit.solver.effort import Effort
from tightfit.solver.highs import INFINITY, Program, Solution
from tightfit.solver.pricing import LeastCosts, Prices
from tightfit.solver.time_cuts import Cut

#: Nodes of the search, at most: what is not proven by then is a bound that is a little lower.
_NODES = 200
#: Variables times the solver's own checks whether to go on, at most (see `Program.solve`): about a second's work.
_EFFORT = 60_000


@dataclass(slots=True)
class _Built:
    """The choices as variables of a program, and what holds bytes at the moments that were asked for."""

    program: Program
    kept: dict[int, int] = field(default_factory=dict)
    """Value to variable: it is kept if saved, or if replay reads it."""
    replayed: dict[int, int] = field(default_factory=dict)
    """Operation to variable."""
    bytes_at: dict[int, dict[int, dict[int, float]]] = field(default_factory=dict)
    """Moment, storage (-1: the tape's own): variable to bytes."""


@dataclass(slots=True)
class RegionProgram:
    """One region's program, described once and solved at any prices or capacities."""

    index: ProfileIndex
    region: int
    shared: frozenset[int]
    """Storages that other regions may hold too."""
    usable: bool = field(init=False)
    """False where there is nothing to decide, for a graph that is kept, for a region whose nodes a backward inside
    forward runs, and for the rare region of which the program could say too much: one with a saved value that backward
    does not read, or that only a second call of its module rebuilds."""
    lines: int = field(init=False, default=0)
    """Rows and columns of the program that was solved last."""
    _slots: dict[int, list[tuple[int, int]]] = field(init=False)
    """Saved droppable value to (saved, let go) of each of its slots."""
    _read: dict[int, int] = field(init=False)
    """The same to the event that reads it first."""
    _ops: list[int] = field(init=False)
    _reads: dict[int, list[int]] = field(init=False)
    _ran: dict[int, int] = field(init=False)
    _readers: dict[int, list[int]] = field(init=False)
    _begins: int = field(init=False)
    _ends: int = field(init=False)
    """Event from which on it holds nothing any more."""

    def __post_init__(self) -> None:
        index, profile = self.index, self.index.profile
        facts = index.facts[self.region]
        # As `PricingModel`: what backwards inside forward read and save again is left out.
        slots = {slot for slot in facts.slots if not index.is_saved_again(slot)}
        times: dict[int, dict[EventKind, int]] = defaultdict(dict)
        self._ran = {}
        for time in index.events_of_region[self.region]:
            kind, a = profile.events[time]
            if kind == EventKind.OP:
                self._ran[a] = time
            elif kind not in (EventKind.EXIT, EventKind.KEEPING) and a in slots and not index.is_keeping(time):
                times[a].setdefault(kind, time)
        never = len(profile.events)
        self._slots = defaultdict(list)
        self._read = {}
        self.usable = bool(slots) and not facts.only_again and not index.keeps_graph
        # What runs again for several graphs runs once for each, of which the program knows nothing.
        self.usable &= not any(index.backward_of_slot[slot] for slot in slots)
        self._begins, self._ends = min(self._ran.values(), default=never), 0
        for slot in sorted(slots):
            value, found = profile.slots[slot].value, times[slot]
            released = found.get(EventKind.RELEASE, never)
            unpacked = found.get(EventKind.UNPACK, never)
            self.usable &= EventKind.SAVE in found and unpacked < never
            self._ends = max(self._ends, released)
            self._slots[value].append((found.get(EventKind.SAVE, never), released))
            self._read[value] = min(self._read.get(value, never), unpacked)
        ops: set[int] = set()
        stack = [profile.values[v].op for v in self._slots]
        while stack:
            op = stack.pop()
            if op in ops:
                continue
            ops.add(op)
            stack += [profile.values[u].op for u in profile.ops[op].inputs if u in facts.own and u in facts.droppable]
        self._ops = sorted(ops)
        self._reads = {op: sorted(set(profile.ops[op].inputs)) for op in self._ops}
        self._readers = defaultdict(list)
        for op, reads in self._reads.items():
            for value in reads:
                self._readers[value].append(op)

    def bound(self, prices: Prices, effort: Effort, gap: float = 0.0) -> tuple[float, Decision | None]:
        """Return a lower bound on the cost of every decision at these prices, and the best decision that was found.

        `effort`: of the search that asks. `gap`: how far apart, in cost, the two may be.
        """
        built = self._build(prices.private, prices)
        for time, price in prices.private.items():
            for storage, entries in built.bytes_at[time].items():
                of_storage = price
                if storage in self.shared:
                    of_storage = prices.shared.get((time, storage, self.region), 0.0)
                for variable, nbytes in entries.items():
                    built.program.costs[variable] += of_storage * nbytes
        solution = self._solved(built.program, effort, gap)
        if solution is None:
            return -INFINITY, None
        return solution.bound, self._decision(built, solution.values)

    def within(
        self, cut: Cut, capacities: Mapping[int, float], held_by_others: Mapping[int, frozenset[int]], effort: Effort
    ) -> tuple[float, Decision | None] | None:
        """Return a time that no decision beats whose levels keep these capacities (moment to bytes), and the fastest
        such decision; None if there is none.

        `cut`: of the way whose time counts.
        `held_by_others`: at each of the moments, shared storages that cost nothing because others hold them.
        `effort`: of the search that asks.
        """
        built = self._build(capacities, Prices(times={cut: 1.0}, private={}, shared={}))
        for time, capacity in capacities.items():
            row: dict[int, float] = defaultdict(float)
            for storage, entries in built.bytes_at[time].items():
                if storage in held_by_others[time]:
                    continue
                for variable, nbytes in entries.items():
                    row[variable] += nbytes / 1024  # sizes and times of one order
            built.program.row(dict(row), -INFINITY, capacity / 1024)
        solution = self._solved(built.program, effort)
        return None if solution is None else (solution.bound, self._decision(built, solution.values))

    def _solved(self, program: Program, effort: Effort, gap: float = 0.0) -> Solution | None:
        self.lines = len(program.costs) + len(program.bounds)
        effort.spend_on_program(self.lines)
        return program.solve(nodes=_NODES, effort=_EFFORT, gap=gap, seconds=effort.seconds_left)

    def _decision(self, built: _Built, values: list[float]) -> Decision | None:
        replayed = {op for op, variable in built.replayed.items() if values[variable] > 0.5}
        if not replayed:
            return None
        optional = self.index.facts[self.region].optional
        read = {u for op in replayed for u in self._reads[op]}
        return keeping(
            self.index,
            (
                v
                for v, variable in built.kept.items()
                if values[variable] > 0.5 and v in optional and (v in self._slots or v in read)
            ),
        )

    def _build(self, times: Iterable[int], prices: Prices) -> _Built:
        index, profile = self.index, self.index.profile
        facts = index.facts[self.region]
        program = Program()
        built = _Built(program)
        costs = LeastCosts.at(index, self.region, prices)
        mode = program.variable(costs.region, 1.0, integer=True)
        for op in self._ops:
            signature = profile.signatures[profile.ops[op].signature]
            built.replayed[op] = program.variable(costs.of(signature), 1.0, integer=True)
            program.row({mode: 1.0, built.replayed[op]: -1.0}, 0.0, INFINITY)
        own = {u for reads in self._reads.values() for u in reads if u in facts.own and u in facts.droppable}
        for value in sorted(own | set(self._slots)):
            if value in facts.optional or value in self._slots:
                built.kept[value] = program.variable(0.0, 1.0, integer=True)
            if value not in facts.optional and value in self._slots:  # held only if the region is left untouched
                program.row({built.kept[value]: 1.0, mode: 1.0}, -INFINITY, 1.0)
        for value in self._slots:
            program.row({built.replayed[profile.values[value].op]: 1.0, built.kept[value]: 1.0}, 1.0, INFINITY)
        for op in self._ops:
            for value in self._reads[op]:
                if value in own:
                    row = {built.replayed[profile.values[value].op]: 1.0, built.replayed[op]: -1.0}
                    if value in facts.optional:
                        row[built.kept[value]] = 1.0
                    program.row(row, 0.0, INFINITY)
        before: dict[int, int] = {}
        for time in sorted(times):
            if self._begins <= time < self._ends:
                before = self._moment(built, time, before)
            else:
                built.bytes_at[time] = {}
        return built

    def _moment(self, built: _Built, time: int, before: Mapping[int, int]) -> dict[int, int]:
        """Add what is held after event `time`; return the variables "replayed by then"."""
        index, profile = self.index, self.index.profile
        facts = index.facts[self.region]
        program, kept, replayed = built.program, built.kept, built.replayed
        held: dict[int, dict[int, float]] = built.bytes_at.setdefault(time, defaultdict(dict))
        done: dict[int, int] = {}
        if any(read <= time for read in self._read.values()):
            done = self._done(built, time, before)
        storage_held: dict[int, int] = {}

        def hold(value: int, row: dict[int, float], constant: float) -> None:
            """Require that the value's storage is there if the row's sum plus `constant` is 1."""
            storage = profile.values[value].storage
            if index.is_resident(storage) or index.fixed_at(storage, time):
                return
            variable = storage_held.get(storage)
            if variable is None:
                variable = storage_held[storage] = program.variable(0.0, 1.0)
                held[storage][variable] = float(index.nbytes(value))
            program.row({variable: 1.0, **{v: -c for v, c in row.items()}}, constant, INFINITY)

        for value, slots in self._slots.items():
            if any(saved <= time < released for saved, released in slots):
                hold(value, {kept[value]: 1.0}, 0.0)
        for op in self._ops:
            if self._ran[op] > time:
                continue
            waits = {replayed[op]: 1.0}
            if op in done:
                waits[done[op]] = -1.0
            if random_bytes := profile.ops[op].random_state_bytes:
                for variable, sign in waits.items():
                    held[-1][variable] = held[-1].get(variable, 0.0) + sign * random_bytes
            for value in self._reads[op]:
                if value in kept and value in facts.optional:
                    hold(value, {**waits, kept[value]: 1.0}, -1.0)
                elif value not in facts.own or value not in facts.droppable:
                    hold(value, waits, 0.0)
        if done:
            self._memoised(built, time, done, held)
        return done

    def _done(self, built: _Built, time: int, before: Mapping[int, int]) -> dict[int, int]:
        """Add for each operation the variable "it has been replayed by then", and return them."""
        profile = self.index.profile
        facts = self.index.facts[self.region]
        program, kept = built.program, built.kept
        done = {op: program.variable(0.0, 1.0) for op in self._ops}
        reasons: dict[int, dict[int, float]] = defaultdict(dict)  # operation -> what may have replayed it
        free: dict[int, float] = defaultdict(float)
        for value, read in self._read.items():
            if read <= time:
                op = profile.values[value].op
                program.row({done[op]: 1.0, kept[value]: 1.0}, 1.0, INFINITY)
                reasons[op][kept[value]] = reasons[op].get(kept[value], 0.0) - 1.0
                free[op] += 1.0
        for reader in self._ops:
            for value in self._reads[reader]:
                if value not in facts.own or value not in facts.droppable:
                    continue
                op = profile.values[value].op
                row = {done[op]: 1.0, done[reader]: -1.0}
                if value in facts.optional:
                    row[kept[value]] = 1.0
                program.row(row, 0.0, INFINITY)
                reasons[op][done[reader]] = reasons[op].get(done[reader], 0.0) + 1.0
        for op in self._ops:
            program.row({done[op]: 1.0, built.replayed[op]: -1.0}, -INFINITY, 0.0)
            program.row({done[op]: 1.0, **{v: -c for v, c in reasons[op].items()}}, -INFINITY, free[op])
            outputs = [v for v in profile.ops[op].outputs if v in self._slots or self._readers.get(v)]
            if len(outputs) == 1 and outputs[0] in facts.optional:
                program.row({done[op]: 1.0, kept[outputs[0]]: 1.0}, -INFINITY, 1.0)
            if op in before:
                program.row({done[op]: 1.0, before[op]: -1.0}, 0.0, INFINITY)
        return done

    def _memoised(self, built: _Built, time: int, done: Mapping[int, int], held: dict[int, dict[int, float]]) -> None:
        """Add the rebuilt values that somebody still wants after event `time`."""
        index, profile = self.index, self.index.profile
        program, kept, replayed = built.program, built.kept, built.replayed
        for op in self._ops:
            for value in profile.ops[op].outputs:
                rows: list[tuple[dict[int, float], float]] = []
                unless_kept = {kept[value]: -1.0} if value in kept else {}
                if any(released > time for _, released in self._slots.get(value, ())):
                    rows.append(({done[op]: 1.0, **unless_kept}, 0.0))
                rows += [
                    ({done[op]: 1.0, replayed[reader]: 1.0, done[reader]: -1.0, **unless_kept}, -1.0)
                    for reader in self._readers.get(value, ())
                ]
                if not rows:
                    continue
                there = program.variable(0.0, 1.0)
                held[-1][there] = float(index.nbytes(value))
                for row, constant in rows:
                    program.row({there: 1.0, **{v: -c for v, c in row.items()}}, constant, INFINITY)
