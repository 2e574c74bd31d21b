"""rotor: optimal checkpointing of heterogeneous chains.

Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova (2019), "Optimal checkpointing for heterogeneous chains: how to train
deep neural networks with limited memory", arXiv:1911.13214.  Written from the paper's Theorem 1.

A network is a chain of stages.  Stage s reads the activation a^(s-1) and makes a^s; run with everything saved it makes
abar^s, which contains a^s.  Optimal among *memory persistent* schedules: what is checkpointed stays until its backward.

The chain that `chain_of` makes of a tightfit profile is coarser than the profile: a stage is all or nothing, memory
outside the regions is a constant, and what skips a stage is counted with every stage that it passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from tightfit.records import Decision, EventKind
from tightfit.simulation.levers import BY_VALUE
from tightfit.simulation.profile_index import ProfileIndex

#: Memory is counted in so many slots, sizes rounded up: the plans hold, at the price of at most a slot for each stage.
SLOTS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a chain; bytes may be any unit."""

    forward_ms: float
    backward_ms: float
    output_bytes: int
    """omega_a: what it hands to the next stage."""
    saved_bytes: int
    """omega_abar: all that it saves for its backward, its output included, its input not."""
    forward_transient_bytes: int = 0
    backward_transient_bytes: int = 0
    gradient_bytes: int = 0
    """omega_delta: gradient of its output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What the recurrence found."""

    recompute_ms: float
    """Total time minus one forward and one backward of every stage."""
    runs: tuple[int, ...]
    """How often each stage's forward runs."""


def in_slots(stages: Sequence[Stage], memory_bytes: int, slots: int = SLOTS) -> tuple[list[Stage], int]:
    """The chain with sizes in slots of `memory_bytes` / `slots`, rounded up, and the memory in slots."""
    unit = max(1, memory_bytes / slots)

    def up(nbytes: int) -> int:
        return math.ceil(nbytes / unit - 1e-9)

    scaled = [
        Stage(
            forward_ms=stage.forward_ms,
            backward_ms=stage.backward_ms,
            output_bytes=up(stage.output_bytes),
            saved_bytes=up(stage.saved_bytes),
            forward_transient_bytes=up(stage.forward_transient_bytes),
            backward_transient_bytes=up(stage.backward_transient_bytes),
            gradient_bytes=up(stage.gradient_bytes),
        )
        for stage in stages
    ]
    return scaled, int(memory_bytes / unit + 1e-9)


def rotor(stages: Sequence[Stage], memory: int) -> Schedule | None:
    """The fastest persistent schedule within `memory` (in the stages' unit, the chain's input apart); None: none fits.

    Theorem 1, with C(s, t, m) the least time from stage s to t with the input of s in memory and not counted in m:

        C(s, t, m) = min( F_all:  f_s + C(s+1, t, m - abar_s) + b_s,
                          F_ck:   min over s < c <= t of  f_s + ... + f_(c-1) + C(c, t, m - a_(c-1)) + C(s, c-1, m) )
    """
    n = len(stages)
    before_ms = [0.0, *accumulate(stage.forward_ms for stage in stages)]

    def fits_all(s: int, t: int, m: int) -> bool:
        stage, last = stages[s], stages[t]
        forward = last.gradient_bytes + stage.saved_bytes + stage.forward_transient_bytes
        backward = stage.gradient_bytes + stage.saved_bytes + stage.backward_transient_bytes
        return m >= max(forward, backward)

    @cache
    def through_bytes(s: int, t: int) -> int:
        """Least memory to run from stage s to the one before t with nothing saved."""
        first = stages[s]
        needs = [first.output_bytes + first.forward_transient_bytes]
        needs += [
            stages[j - 1].output_bytes + stages[j].output_bytes + stages[j].forward_transient_bytes
            for j in range(s + 1, t)
        ]
        return stages[t].gradient_bytes + max(needs)

    @cache
    def least(s: int, t: int, m: int) -> tuple[float, int]:
        """Time, and the choice: -1 for F_all, else the stage before which F_ck puts its checkpoint."""
        best = (math.inf, -1)
        if m < 0:
            return best
        if fits_all(s, t, m):
            rest = least(s + 1, t, m - stages[s].saved_bytes)[0] if s < t else 0.0
            best = (stages[s].forward_ms + rest + stages[s].backward_ms, -1)
        if s < t and m >= through_bytes(s, t):
            for c in range(s + 1, t + 1):
                right = least(c, t, m - stages[c - 1].output_bytes)[0]
                if before_ms[c] - before_ms[s] + right < best[0]:
                    ms = before_ms[c] - before_ms[s] + right + least(s, c - 1, m)[0]
                    if ms < best[0]:
                        best = (ms, c)
        return best

    total_ms = least(0, n - 1, memory)[0]
    if math.isinf(total_ms):
        return None
    runs = [0] * n
    todo = [(0, n - 1, memory)]
    while todo:
        s, t, m = todo.pop()
        choice = least(s, t, m)[1]
        if choice < 0:
            runs[s] += 1
            if s < t:
                todo.append((s + 1, t, m - stages[s].saved_bytes))
            continue
        for stage in range(s, choice):
            runs[stage] += 1
        todo += [(choice, t, m - stages[choice - 1].output_bytes), (s, choice - 1, m)]
    plain_ms = sum(stage.forward_ms + stage.backward_ms for stage in stages)
    return Schedule(recompute_ms=max(0.0, total_ms - plain_ms), runs=tuple(runs))


def chain_of(index: ProfileIndex) -> tuple[list[Stage], list[int]]:
    """The profile's regions as a chain, and the region of each stage.

    A stage is a region that runs operations; one with nothing to drop is a stage all the same, as in rotor, where
    every stage may run again.  Its backward is whatever ran between the first reading of one of its savings and the
    first reading of another stage's.
    """
    profile = index.profile
    regions = [place for place, region in enumerate(profile.regions) if region.op_count]
    stage_of = {region: stage for stage, region in enumerate(regions)}
    backward_ms = [0.0] * len(regions)
    backward_workspace = [0] * len(regions)
    forward_workspace = [0] * len(regions)
    current = len(regions) - 1
    for time, event in enumerate(profile.events):
        if event.kind == EventKind.OPTIMIZER:
            break
        owner = index.owner(event)
        if event.kind == EventKind.OP:
            workspace = profile.signatures[profile.ops[event.a].signature].workspace_bytes
            stage = stage_of[owner]
            forward_workspace[stage] = max(forward_workspace[stage], workspace)
        if time < index.backward_event():
            continue
        if owner in stage_of:
            current = stage_of[owner]
        elif event.kind == EventKind.OTHER_OP:
            backward_ms[current] += profile.signatures[event.a].ms
            backward_workspace[current] = max(backward_workspace[current], profile.signatures[event.a].workspace_bytes)
    last_reader = {
        value: stage_of[index.region_of_op[op]] for op, record in enumerate(profile.ops) for value in record.inputs
    }
    passing = [0] * len(regions)
    for value, last in last_reader.items():
        producer = index.producer_region(value)
        if producer >= 0 and not index.is_free(value):
            for stage in range(stage_of[producer], last):
                passing[stage] += index.nbytes(value)
    stages = []
    for stage, region in enumerate(regions):
        record = profile.regions[region]
        ops = range(record.first_op, record.first_op + record.op_count)
        saved = {profile.slots[slot].value for slot in index.slots_of_region[region]}
        own = {
            profile.values[v].storage: index.nbytes(v)
            for v in saved
            if index.region_of_op[profile.values[v].op] == region and profile.values[v].op >= 0 and not index.is_free(v)
        }
        stages.append(
            Stage(
                forward_ms=sum(profile.signatures[profile.ops[op].signature].ms for op in ops),
                backward_ms=backward_ms[stage],
                output_bytes=passing[stage],
                saved_bytes=max(sum(own.values()), passing[stage]),
                forward_transient_bytes=forward_workspace[stage],
                backward_transient_bytes=backward_workspace[stage],
                gradient_bytes=passing[stage],
            )
        )
    return stages, regions


def one_level_decisions(
    index: ProfileIndex, regions: Sequence[int], schedule: Schedule
) -> list[Decision | None] | None:
    """The schedule as decisions: a stage that runs twice drops everything. None if one runs more often."""
    if max(schedule.runs) > 2:
        return None
    decisions: list[Decision | None] = [None] * len(index.profile.regions)
    for region, runs in zip(regions, schedule.runs, strict=True):
        if runs == 2 and index.facts[region].slots:
            decisions[region] = BY_VALUE.decide(())
    return decisions
