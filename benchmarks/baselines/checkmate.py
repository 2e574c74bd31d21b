"""Checkmate: optimal tensor rematerialisation as a mixed-integer program.

Jain et al. (2020), "Checkmate: breaking the memory wall with optimal tensor rematerialization", MLSys 2020,
arXiv:1910.02653.  R[t,i]: operation i runs in stage t.  S[t,v]: value v is held when stage t begins.  F[t,v,k]: value v
is freed in stage t after operation k.  Stages advance the frontier (their section 4.4): stage t ends when backward's
t-th read of a saving can be served.

The program is over a row of consecutive regions of a tightfit profile, under the profile's own times, sizes and
events; everything outside the row is as in the plain step.  Against Checkmate as published:

* Each reading of a saving by backward is a stage.  Backward's own operations are not variables: each runs once, where
  the profile says, as in any schedule that computes gradients once.
* Forward is one stage: operations run once, in program order, and storages die there when Python lets go of them.
  Published Checkmate may also recompute within forward and has a stage for each of its operations; for one GPT block
  that is over 10,000 binaries more, which HiGHS does not finish.  No plan of tightfit does it either.
* Memory is what is held plus what the stage has made so far minus what it has freed, as a flow of copies: equal to the
  paper's U and FREE on integer points, with a linear relaxation that is no weaker.

Against tightfit, the space is larger: a value may be held for a part of backward, an operation may be replayed at
several reads, and values that pass between the row's regions may be dropped.  So at zero overhead of the mechanism
the optimum here is never above tightfit's plan on the same row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tightfit.records import EventKind, Profile
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.highs import INFINITY, Program

_SCRATCH_KINDS = (EventKind.OP, EventKind.OTHER_OP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimum:
    """What the solver knows when it stops."""

    recompute_ms: float | None
    """Of the best schedule found; None if none was."""
    bound_ms: float
    """No schedule recomputes less."""
    status: str
    """"optimal", "time limit" or "infeasible"."""
    variables: int
    rows: int
    held: frozenset[int] = frozenset()
    """Values of the row held from forward to the first read of backward, in the best schedule found."""
    runs: tuple[tuple[int, int], ...] = ()
    """(stage, operation) of each run in backward, in order."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """One place in which a value may be: its storage of forward, or what a replay made. Usually they are one."""

    value: int
    nbytes: int
    storage: int
    """The storage of forward, free of charge while something else keeps it; -1: always charged."""
    born: int
    """Event of forward after which it may be held; -1: only a replay makes it."""
    maker: int
    """Operation that remakes it; -1: none."""


def only(profile: Profile, first: int, count: int) -> Profile:
    """The profile in which nothing but `count` regions from `first` may be dropped, without the mechanism's cost."""
    inside = range(first, first + count)
    classes = max(region.class_id for region in profile.regions) + 1
    ops = list(profile.ops)
    regions = []
    for place, region in enumerate(profile.regions):
        if place in inside:
            regions.append(region)
            continue
        regions.append(replace(region, class_id=region.class_id + classes))
        for op in range(region.first_op, region.first_op + region.op_count):
            ops[op] = replace(ops[op], keep_reason=ops[op].keep_reason or "outside the row")
    return replace(
        profile, ops=tuple(ops), regions=tuple(regions), mode_ms_per_op=0.0, tape_ms_per_op=0.0
    )  # fmt: skip


class _Row:
    """What the program is about: the row's operations, copies, stages, and the memory of everything else."""

    def __init__(self, index: ProfileIndex, first: int, count: int) -> None:
        self.index = index
        profile = self.profile = index.profile
        self.facts = index.tape_facts(first, count)
        self._walk_rest()
        ran = {event.a: time for time, event in enumerate(profile.events) if event.kind == EventKind.OP}
        middle = index.backward_event()
        slots = set(self.facts.slots)
        released = {e.a: time for time, e in enumerate(profile.events) if e.kind == EventKind.RELEASE}
        #: (event, value read, event at which autograd lets go of it)
        self.reads: list[tuple[int, int, int]] = []
        for time, (kind, a) in enumerate(profile.events):
            if kind == EventKind.UNPACK and a in slots:
                if time < middle:
                    raise ValueError("a saving is read before backward begins: not a frontier of stages")
                self.reads.append((time, profile.slots[a].value, released.get(a, len(profile.events))))
        wanted = {value for _, value, _ in self.reads}
        stack = list(wanted)
        ops: set[int] = set()
        while stack:
            op = profile.values[stack.pop()].op
            if op in ops:
                continue
            ops.add(op)
            for value in profile.ops[op].inputs:
                if value in self.facts.own and value in self.facts.droppable:
                    stack.append(value)
        self.ops = sorted(ops)
        self.last_stage = self._last_stages()
        self.copies: list[_Copy] = []
        self.of_value: dict[int, list[int]] = {}
        """Value to its copies; values of the baseline have none and are always there."""
        self.state: dict[int, int] = {}
        """Random operation to the copy that stands for the generator's recorded state."""
        values = wanted | {v for op in self.ops for v in (*profile.ops[op].inputs, *profile.ops[op].outputs)}
        for value in sorted(values):
            if not index.is_free(value):
                self._add_copies(value, ran, middle)
        for op in self.ops:
            nbytes = profile.ops[op].random_state_bytes
            if nbytes:
                self.state[op] = len(self.copies)
                self.copies.append(_Copy(-1, nbytes, -1, ran[op], -1))

    def _add_copies(self, value: int, ran: dict[int, int], middle: int) -> None:
        index, record = self.index, self.profile.values[value]
        may_rebuild = value in self.facts.own and value in self.facts.droppable
        maker = record.op if may_rebuild and record.op in self.ops else -1
        born = -1 if record.overwritten else ran.get(record.op, 0)
        nbytes, storage = index.nbytes(value), record.storage
        found = self.of_value.setdefault(value, [])
        stays = any(self.lives_anyway(storage, time) for time in range(middle, len(self.profile.events)))
        if born >= 0 and maker >= 0 and not stays:
            found.append(len(self.copies))
            self.copies.append(_Copy(value, nbytes, storage, born, maker))
            return
        if born >= 0:
            found.append(len(self.copies))
            self.copies.append(_Copy(value, nbytes, storage, born, -1))
        if maker >= 0:
            found.append(len(self.copies))
            self.copies.append(_Copy(value, nbytes, -1, -1, maker))

    def _last_stages(self) -> dict[int, int]:
        """The last stage for which each operation may be of use."""
        profile = self.profile
        last: dict[int, int] = {}
        for stage, (_, value, _) in enumerate(self.reads):
            last[profile.values[value].op] = stage
        for op in reversed(self.ops):
            for value in profile.ops[op].inputs:
                maker = profile.values[value].op
                if value in self.facts.own and value in self.facts.droppable:
                    last[maker] = max(last.get(maker, -1), last.get(op, -1))
        return last

    def _walk_rest(self) -> None:
        """Bytes after each event, and highest within it, of what no decision for the row concerns."""
        profile, index = self.profile, self.index
        fixed = set(index.fixed_slots) | {slot for facts in index.facts for slot in facts.slots}
        fixed -= set(self.facts.slots)
        held: Counter[int] = Counter()
        level = profile.baseline_bytes + profile.correction_bytes + profile.margin_bytes
        self.level: list[int] = []
        self.high: list[int] = []
        self._lives: dict[int, list[tuple[int, int]]] = {}
        born: dict[int, int] = {}
        for time, (kind, a) in enumerate(profile.events):
            storage = -1
            change = 0
            if kind in (EventKind.ALLOC, EventKind.FREE):
                storage, change = a, 1 if kind == EventKind.ALLOC else -1
            elif kind in (EventKind.SAVE, EventKind.RELEASE) and a in fixed:
                storage, change = profile.values[profile.slots[a].value].storage, 1 if kind == EventKind.SAVE else -1
            if storage >= 0 and not index.is_resident(storage):
                held[storage] += change
                if change > 0 and held[storage] == 1:
                    level += profile.storages[storage].nbytes
                    born[storage] = time
                elif change < 0 and held[storage] == 0:
                    level -= profile.storages[storage].nbytes
                    self._lives.setdefault(storage, []).append((born.pop(storage), time))
            signature = profile.ops[a].signature if kind == EventKind.OP else a
            workspace = profile.signatures[signature].workspace_bytes if kind in _SCRATCH_KINDS else 0
            self.level.append(level)
            self.high.append(level + workspace)
        for storage, start in born.items():
            self._lives.setdefault(storage, []).append((start, len(profile.events)))

    def lives_anyway(self, storage: int, time: int) -> bool:
        """The storage is alive after event `time` whatever is decided for the row."""
        return any(start <= time < end for start, end in self._lives.get(storage, ()))

    def charge(self, copy: _Copy, time: int) -> int:
        """Bytes that holding the copy adds at event `time`."""
        return 0 if copy.storage >= 0 and self.lives_anyway(copy.storage, time) else copy.nbytes


class _Rows:
    """Rows "sum of bytes <= spare", of which only the tightest for each left-hand side is kept."""

    def __init__(self) -> None:
        self.spare: dict[tuple[tuple[int, int], ...], int] = {}

    def add(self, entries: dict[int, int], spare: int) -> None:
        key = tuple(sorted((variable, nbytes) for variable, nbytes in entries.items() if nbytes))
        self.spare[key] = min(spare, self.spare.get(key, spare))


@dataclass(frozen=True, slots=True)
class _Formulated:
    program: Program
    held: list[dict[int, int]]
    """For each stage, copy to the variable that says that the stage finds it."""
    runs: list[dict[int, int]]
    """For each stage, operation to the variable that says that it runs."""


def _formulate(row: _Row, budget_bytes: int, unit: int) -> _Formulated | None:
    """The program; None if the budget is too small whatever is decided."""
    profile, index = row.profile, row.index
    program = Program()
    copies, ops, reads = row.copies, row.ops, row.reads
    stage_count = len(reads)
    passes = profile.accumulation_steps
    memory = _Rows()
    held = [
        {c: program.variable(0.0, 1.0, integer=True) for c, copy in enumerate(copies) if stage or copy.born >= 0}
        for stage in range(stage_count)
    ]
    runs = [
        {
            op: program.variable(passes * profile.signatures[profile.ops[op].signature].ms, 1.0, integer=True)
            for op in ops
            if stage <= row.last_stage[op]
        }
        for stage in range(stage_count)
    ]
    # Forward, and backward up to the first read: what the first stage finds is held from its making on.
    first_read = reads[0][0]
    for time in range(first_read + 1):
        entries = {
            held[0][c]: row.charge(copy, time) for c, copy in enumerate(copies) if c in held[0] and copy.born <= time
        }
        memory.add(entries, budget_bytes - row.high[time])
    for stage, (time, _, _) in enumerate(reads):
        now, run = held[stage], runs[stage]
        after = held[stage + 1] if stage + 1 < stage_count else {}
        touched: dict[int, list[int]] = {}  # copy -> operations of the stage after which it may be freed
        for op in run:
            for c in _copies_of(row, op):
                touched.setdefault(c, []).append(op)
        freed = {
            (c, op): program.variable(0.0, 1.0, integer=True) for c, after_ops in touched.items() for op in after_ops
        }

        def present(c: int, before: int, now=now, run=run, touched=touched, freed=freed) -> dict[int, float]:
            """Whether a copy is there before operation `before` of the stage (the end: a number above all)."""
            entries: dict[int, float] = {}
            if c in now:
                entries[now[c]] = 1.0
            maker = copies[c].maker
            if maker in run and maker < before:
                entries[run[maker]] = 1.0
            entries.update({freed[c, op]: -1.0 for op in touched.get(c, ()) if op < before})
            return entries

        end = len(profile.ops)
        for c in range(len(copies)):
            left = present(c, end)
            if left:
                # What the next stage finds was there at the end of this one; nothing is freed twice.
                program.row({**left, **({after[c]: -1.0} if c in after else {})}, 0.0, INFINITY)
            elif c in after:
                program.row({after[c]: 1.0}, 0.0, 0.0)
        for op in run:
            for value_read in set(profile.ops[op].inputs):
                if not index.is_free(value_read):
                    _require(program, [present(c, op) for c in row.of_value[value_read]], run[op])
            if op in row.state:
                _require(program, [present(row.state[op], op)], run[op])
        # Autograd holds what it has read until it lets go of it: at the end of this stage and of those until then.
        for earlier, (_, pinned, until) in enumerate(reads[: stage + 1]):
            if earlier == stage or until > time:
                _require(program, [present(c, end) for c in row.of_value[pinned]], -1)
        level: dict[int, int] = {now[c]: row.charge(copies[c], time) for c in now}
        memory.add(level, budget_bytes - row.level[time])
        for op in run:
            made = sum(index.nbytes(v) for v in profile.ops[op].outputs)
            record = profile.ops[op]
            inside = profile.signatures[record.signature].workspace_bytes + record.random_state_bytes
            high = dict(level)
            high[run[op]] = high.get(run[op], 0) + made + inside
            for mutated in set(record.mutates):  # written in place where nobody else wants the old value
                for c in row.of_value.get(mutated, ()):
                    high[freed[c, op]] = -row.charge(copies[c], time)
            memory.add(high, budget_bytes - row.level[time])
            level[run[op]] = level.get(run[op], 0) + made
            for c in _copies_of(row, op):
                level[freed[c, op]] = level.get(freed[c, op], 0) - row.charge(copies[c], time)
        # Until the next read: what that stage finds, and what autograd has read and not let go of.
        following = reads[stage + 1][0] if stage + 1 < stage_count else len(profile.events)
        for moment in range(time, following):
            entries = {after[c]: row.charge(copies[c], moment) for c in after}
            spare = budget_bytes - row.high[moment]
            for pinned in {v for _, v, until in reads[: stage + 1] if until > moment}:
                for c in row.of_value[pinned][:1]:  # of two copies, the cheaper: in favour of this program
                    spare -= row.charge(copies[c], moment)
                    if c in after:
                        entries[after[c]] = 0
            memory.add(entries, spare)
    for key, spare in memory.spare.items():
        if not key:
            if spare < 0:
                return None
            continue
        # All sizes are multiples of the unit, so nothing is lost by rounding the spare bytes down to it.
        if sum(max(0, nbytes) for _, nbytes in key) > spare:
            program.row({variable: nbytes / unit for variable, nbytes in key}, -INFINITY, spare // unit)
    return _Formulated(program, held, runs)


def _copies_of(row: _Row, op: int) -> list[int]:
    """Copies that an operation reads or makes."""
    record = row.profile.ops[op]
    found = {c for value in record.inputs for c in row.of_value.get(value, ())}
    found |= {c for value in record.outputs for c in row.of_value.get(value, ()) if row.copies[c].maker == op}
    found |= {row.state[op]} if op in row.state else set()
    return sorted(found)


def _require(program: Program, ways: Sequence[dict[int, float]], needed_by: int) -> None:
    """One of the ways holds if variable `needed_by` is set; -1: in any case."""
    entries: Counter[int] = Counter()
    for way in ways:
        entries.update(way)  # type: ignore[arg-type]  # Counter of floats
    if needed_by >= 0:
        entries[needed_by] -= 1
    program.row(dict(entries), 0.0 if needed_by >= 0 else 1.0, INFINITY)


def checkmate(
    index: ProfileIndex,
    first: int,
    count: int,
    budget_bytes: int,
    *,
    time_limit_s: float = 60.0,
) -> Optimum:
    """The least time of recomputation within the budget for `count` regions from `first` of a profile made `only`."""
    import highspy

    from tightfit.solver.columns import ColumnSource
    from tightfit.solver.master import Master

    row = _Row(index, first, count)
    if not row.reads:
        return Optimum(recompute_ms=0.0, bound_ms=0.0, status="optimal", variables=0, rows=0)
    unit = Master(ColumnSource(index)).unit
    formulated = _formulate(row, budget_bytes, unit)
    if formulated is None:
        return Optimum(recompute_ms=None, bound_ms=INFINITY, status="infeasible", variables=0, rows=0)
    program = formulated.program
    highs = highspy._core._Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("time_limit", time_limit_s)
    highs.setOptionValue("mip_rel_gap", 0.0)
    highs.setOptionValue("mip_abs_gap", 1e-7)
    highs.passModel(program.model())
    highs.run()
    info, status = highs.getInfo(), highs.getModelStatus()
    statuses = highspy.HighsModelStatus
    size = {"variables": len(program.costs), "rows": len(program.bounds)}
    if status == statuses.kInfeasible:
        return Optimum(recompute_ms=None, bound_ms=INFINITY, status="infeasible", **size)
    found = float(info.objective_function_value)
    bound = max(0.0, float(info.mip_dual_bound))
    if not found < INFINITY:
        return Optimum(recompute_ms=None, bound_ms=bound, status="time limit", **size)
    values = highs.getSolution().col_value
    own = row.facts.own
    return Optimum(
        recompute_ms=found,
        bound_ms=bound,
        status="optimal" if status == statuses.kOptimal else "time limit",
        **size,
        held=frozenset(
            row.copies[c].value
            for c, variable in formulated.held[0].items()
            if values[variable] > 0.5 and row.copies[c].value in own
        ),
        runs=tuple(
            (stage, op)
            for stage, run in enumerate(formulated.runs)
            for op, variable in run.items()
            if values[variable] > 0.5
        ),
    )
